"""One label, colour, marker and line for each contender, the same in every picture.

The colours are from Paul Tol's and Okabe and Ito's palettes, which readers with any colour vision can tell apart. A
contender is recognised by its colour and its marker together. SmartKV's own contenders have thick lines, others thin
ones, and nulls and oracles stand back in grey with hollow markers.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

BLUE, GREY, DARK_GREY, BLACK = "#0072B2", "#8C8C8C", "#555555", "#222222"


@dataclass(frozen=True)
class ContenderStyle:
    """How one contender is drawn.

    Attributes:
        label: its name in a legend, as a person would write it.
        colour: hex RGB.
        marker: a matplotlib marker.
        line: a matplotlib line style; the empty string for a contender whose points belong to no line.
        width: line width in points.
        hollow: whether the marker is drawn with a white face.
        order: drawing order; a higher one lies on top.
    """

    label: str
    colour: str
    marker: str
    line: str = "-"
    width: float = 1.3
    hollow: bool = False
    order: int = 2

    def plot(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        return {
            "label": self.label,
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.line,
            "linewidth": self.width,
            "markersize": 7 if self.marker in "*PX" else 6 if self.order > 2 else 5.5,
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour,
            "zorder": self.order,
        }

    def bar(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.bar`."""
        return {"label": self.label, "color": self.colour, "zorder": self.order}


def _ours(label: str, colour: str, marker: str) -> ContenderStyle:
    return ContenderStyle(label, colour, marker, width=2.6, order=4)


def _null(label: str, colour: str, marker: str) -> ContenderStyle:
    return ContenderStyle(label, colour, marker, line=":", width=1.1, hollow=True, order=1)


def _oracle(label: str, colour: str, marker: str) -> ContenderStyle:
    return ContenderStyle(label, colour, marker, line="--", width=1.1, hollow=True, order=1)


def _quantised(label: str, colour: str, marker: str) -> ContenderStyle:
    return ContenderStyle(label, colour, marker, line="", order=3)


KINDS: dict[str, Callable[[str, str, str], ContenderStyle]] = {
    "ours": _ours,
    "rule": ContenderStyle,
    "full": ContenderStyle,
    "null": _null,
    "oracle": _oracle,
    "quantised": _quantised,
}
STYLES = {
    # SmartKV
    "gates": _ours("SmartKV gates", BLUE, "o"),
    "gates+8bit": _ours("SmartKV gates, 8 bits", "#332288", "P"),
    "gates+k6v4": _ours("SmartKV gates, keys 6 and values 4 bits", "#44AA99", "X"),
    "gates+pinned": _ours("SmartKV gates, prompt pinned", BLUE, "X"),
    "gates@budget": _ours("SmartKV gates, budget", "#004488", "P"),
    "gates@budget+pinned": _ours("SmartKV gates, budget, prompt pinned", "#004488", "X"),
    "all-gated": _ours("SmartKV, all layers gated", "#3B9BD9", "D"),
    "default": _ours("SmartKV, named hybrid", "#88CCEE", "^"),
    "lifespan": _ours("SmartKV, lifespan policy", "#6699CC", "v"),
    "auto": _ours("SmartKV, windows by layer", "#004488", "d"),
    # published rules
    "window": ContenderStyle("StreamingLLM window", "#E69F00", "s", width=1.8, order=3),
    "key_norm": ContenderStyle("Key norm", "#999933", "D"),
    "keydiff": ContenderStyle("KeyDiff", "#882255", "^"),
    "expected_attention": ContenderStyle("Expected Attention", "#AA4499", "v"),
    "snapkv": ContenderStyle("SnapKV", "#117733", "<"),
    "tova": ContenderStyle("TOVA", "#CC6677", ">"),
    "h2o": ContenderStyle("H2O", "#D55E00", "h"),
    "random": ContenderStyle("Random keys", "#777777", "x", line="-.", order=1),
    "random_pinned": ContenderStyle("Random keys, question pinned", "#777777", "+", line="-.", order=1),
    "random@budget": ContenderStyle("Random keys, budget", "#777777", "1", line="-.", order=1),
    "random@budget+pinned": ContenderStyle("Random keys, budget, prompt pinned", "#777777", "2", line="-.", order=1),
    # nulls and oracles
    "null:token_table": _null("Token-id table (null)", GREY, "s"),
    "null:position": _null("Position only (null)", GREY, "^"),
    "null:constant": _null("Constant a head (null)", GREY, "o"),
    "null:random": _null("Random label (null)", GREY, "D"),
    "oracle": _oracle("True future attention (oracle)", DARK_GREY, "d"),
    "oracle:lifespan": _oracle("True lifespan (oracle)", DARK_GREY, "*"),
    "oracle:attention": _oracle("True future attention (oracle)", DARK_GREY, "d"),
    # every key, in few bits: points
    "quant:int8": _quantised("INT8", BLACK, "s"),
    "quant:int4": _quantised("INT4", BLACK, "D"),
    "quant:kivi4": _quantised("KIVI, 4 bits", "#661100", "^"),
    "quant:kivi": _quantised("KIVI, keys 2 and values 4 bits", "#661100", ">"),
    "quant:kivi2": _quantised("KIVI, 2 bits", "#661100", "v"),
    "quant:adaptive": _quantised("Adaptive precision, by attention", "#6699CC", "*"),
    "quant:adaptive_gates": _quantised("Adaptive precision, by gates", BLUE, "*"),
    # caches that evict nothing
    "full": ContenderStyle("Full cache", BLACK, "o", line=":"),
    "smartkv": _ours("SmartKV", BLUE, "o"),
    "smartkv_full": ContenderStyle("SmartKV's slots, nothing evicted", "#88CCEE", "^"),
    "dynamic": ContenderStyle("DynamicCache", BLACK, "s"),
    "static": ContenderStyle("StaticCache", "#661100", "D"),
    # ways to harvest and to train
    "smartkv_all_labels": ContenderStyle("SmartKV, all labels", "#332288", "P", width=1.8),
    "forward": ContenderStyle("Forward pass alone (SDPA)", BLACK, "s", line="--"),
    "output_attentions": ContenderStyle("output_attentions=True", "#661100", "D"),
    "together": _ours("All gates together", BLUE, "o"),
    "apart": ContenderStyle("One gate after another", "#661100", "D"),
    "plain": ContenderStyle("Nothing: plain LoRA", "#661100", "D"),
}
SAME = {  # other names of the same contender
    "press:lifespan": "gates",
    "press:knorm": "key_norm",
    "press:keydiff": "keydiff",
    "press:snapkv": "snapkv",
    "press:expected_attention": "expected_attention",
    "press:streaming_llm": "window",
    "press:tova": "tova",
    "token_table": "null:token_table",
    "position": "null:position",
    "constant": "null:constant",
}
COLOURS = ("#0072B2", "#E69F00", "#117733", "#CC6677", "#332288", "#999933", "#AA4499", "#661100", "#44AA99", "#222222")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "h")
FALLBACKS = [(colour, marker) for marker in "pH8dP*X" for colour in COLOURS[1:]]


def contender_label(name: str) -> str:
    """Return a contender's name as a person would write it; `gates 0.25` becomes `SmartKV gates, 0.25`."""
    return contender_styles([name])[name].label


def contender_styles(names: Iterable[str], kinds: Mapping[str, str] | None = None) -> dict[str, ContenderStyle]:
    """Return the style of each named contender of one picture.

    A name that is not in the table gets a colour and a marker that depend on the name alone, unless another contender
    of the same picture has them already.

    Args:
        names: contenders as `eval compare` names them, with or without a footprint after a space.
        kinds: name -> ours, rule, null, oracle or quantised, which decides the line of a name that is not in the table.
    """
    names = list(dict.fromkeys(names))
    styles: dict[str, ContenderStyle] = {}
    for name in names:
        known = _known(name)
        if known is not None:
            styles[name] = known
    taken = {(style.colour, style.marker) for style in (*STYLES.values(), *styles.values())}
    for name in names:
        if name not in styles:
            first = zlib.crc32(name.encode()) % len(FALLBACKS)
            places = (FALLBACKS[(first + step) % len(FALLBACKS)] for step in range(len(FALLBACKS)))
            colour, marker = next((place for place in places if place not in taken), FALLBACKS[first])
            taken.add((colour, marker))
            kind = (kinds or {}).get(name, "quantised" if name.startswith("quant:") else "rule")
            styles[name] = KINDS[kind](_readable(name), colour, marker)
    return {name: styles[name] for name in names}


def _split(name: str) -> tuple[str, str]:
    """Return a contender's name and its footprint, if it has one: `gates 0.25` is (`gates`, `0.25`)."""
    match = re.fullmatch(r"(\S+) (\d\S*)", name)
    return (match[1], match[2]) if match else (name, "")


def _known(name: str) -> ContenderStyle | None:
    name, footprint = _split(name)
    style = STYLES.get(SAME.get(name, name))
    if style is None and re.fullmatch(r"random:\d+", name):
        style = STYLES["random"]
    if style is not None and footprint:
        style = replace(style, label=f"{style.label}, {footprint}")
    return style


def _readable(name: str) -> str:
    """Return a label for a name that is not in the table: `all-gated+4bit`, `quant:kivi2@32`, `my_policy`."""
    name, footprint = _split(name)
    rest = f", {footprint}" if footprint else ""
    if name.startswith("quant:") and "@" in name:
        scheme, _, latest = name.partition("@")
        return f"{contender_label(scheme)}, latest {latest} exact{rest}"
    for ending, said in (("+pinned", "prompt pinned"), ("@budget", "budget")):
        if name.endswith(ending):
            return f"{contender_label(name.removesuffix(ending))}, {said}{rest}"
    policy, _, ending = name.rpartition("+")
    bits = re.fullmatch(r"(\d)bit|k(\d)v(\d)", ending)
    if policy and bits:
        both, key, value = bits.groups()
        packed = f"{both} bits" if both else f"keys {key} and values {value} bits"
        return f"{contender_label(policy)}, {packed}{rest}"
    for prefix, kind in (("null:", " (null)"), ("oracle:", " (oracle)"), ("press:", " (press)"), ("quant:", "")):
        if name.startswith(prefix):
            return name.removeprefix(prefix).replace("_", " ") + kind + rest
    return name.replace("_", " ") + rest
