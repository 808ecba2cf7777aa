"""The model card (`README.md`) written beside exported gates."""

import json
from typing import Any


def model_card(gates: int, model: str, layers: str, details: dict[str, Any]) -> str:
    """Write the model card of exported gates.

    The card shows how to use the gates. With a policy and its prices in `details` it shows a cache and a table of
    prices, otherwise the predictions of one layer. With a `report` in `details` it shows what the gates lose by kind of
    text (see `_report`).

    Args:
        gates: Number of gates.
        model: Description of the model's architecture.
        layers: Ranges of the layers that have gates, such as "0-29".
        details: Details of the gates, as in their `config.json`.

    Returns:
        Markdown with the front matter of a hub model card.
    """
    has_prices = bool(details.get("policy") and details.get("prices"))
    snippet = _cache_snippet(details) if has_prices else _PREDICT_SNIPPET
    predicts = _PREDICTS.get(details.get("target", ""), "how long later queries will attend to it")
    settings = {name: value for name, value in details.items() if name not in _ELSEWHERE}
    licence = details.get("licence")
    licence_line = f"license: {licence}\n" if licence else ""
    return f"""---
library_name: smartkv
tags: [kv-cache, key-eviction]
{licence_line}---

# SmartKV gates

{gates} gates for {model} (layers {layers}), one per KV head. Each gate reads a key before
the rotary embedding and predicts {predicts}.

```python
{snippet.replace("NAME", details.get("name", "this folder or hub id"))}
```
{_report(details["report"]) if details.get("report") else ""}{_price_table(details) if has_prices else ""}
Trained with:

```json
{json.dumps(settings, indent=1, sort_keys=True)}
```
"""


_PREDICTS = {  # by the target in the gates' details; of the others the lifespan
    "log worth": "for each age the log of what keeping it from then on is worth",
    "log future attention": "how much attention later queries will pay to it",
}

_ELSEWHERE = ("prices", "layer_shares", "report")  # details that do not stand among the settings


_PREDICT_SNIPPET = """\
from smartkv import GateBank

gates = GateBank.from_pretrained("NAME", model=model)
log4_lifespan = gates.predict(layer, keys)  # keys [batch, kv_heads, tokens, head_dim]"""


_LOAD = """\
from smartkv import LifespanCache, load_backbone

lm = load_backbone("BACKBONE")
model, inputs = lm.model, lm.tokenizer("Once upon a time", return_tensors="pt")
"""

_CACHE = """\
cache = LifespanCache(model, gates="NAME", footprint=FOOTPRINT)  # share of a full cache's keys
output = model.generate(**inputs, past_key_values=cache, max_new_tokens=200)"""


def usable_footprint(prices: list[list[float]]) -> float:
    """Return a footprint to show in an example: a quarter, or the nearest one that gates have a price for.

    Args:
        prices: [footprint, price] of each footprint, as gates remember them.
    """
    footprints = [footprint for footprint, _ in prices]
    if min(footprints) <= 0.25 <= max(footprints):
        return 0.25
    return min(footprints, key=lambda footprint: abs(footprint - 0.25))


def _cache_snippet(details: dict[str, Any]) -> str:
    backbone = details.get("training", {}).get("backbone")
    load = "from smartkv import LifespanCache\n\n" if backbone is None else _LOAD.replace("BACKBONE", backbone)
    show = "" if backbone is None else "\nprint(lm.tokenizer.decode(output[0], skip_special_tokens=True))"
    return load + _CACHE.replace("FOOTPRINT", str(usable_footprint(details["prices"]))) + show


def _price_table(details: dict[str, Any]) -> str:
    rows = "\n".join(f"| {footprint:.3g} | {price:.3f} |" for footprint, price in details["prices"])
    window = details.get("training", {}).get("window")
    length = f" of {window} tokens" if window else ""
    return f"""
These prices were solved on training windows{length}. A longer text keeps a smaller share at the same price.

| footprint | price |
|---|---|
{rows}
"""


def text_of(row: dict[str, Any]) -> str:
    """Return the name of the kind of text of a report's row, with its split if these are no test texts."""
    split = row.get("split", "test")
    return str(row["text"]) if split == "test" else f"{row['text']} ({split})"


def measured_on(rows: list[dict[str, Any]]) -> str:
    """Return what texts a report read: `test texts`, `validation texts`, or both."""
    splits = sorted({row.get("split", "test") for row in rows})
    return " and ".join(splits) + " texts"


def no_facts(report: dict[str, Any]) -> str | None:
    """Return that the model itself recalls none of the facts that a report asked for; None: it recalls some."""
    facts = report.get("facts") or {"asked": 0}
    if not facts["asked"] or facts["recalled"]:
        return None
    return f"the full cache recalls 0 of {facts['asked']} facts"


def _report(report: dict[str, Any]) -> str:
    """Write what was measured.

    Args:
        report: `texts`, rows with `text`, `target`, `footprint`, `delta_nll`, `interval`, `windows`,
            `split` (without one: test) and `window_delta_nll` (a sliding window's at the same footprint; None: not
            measured); `recall`, rows with `target`, `footprint`, `right`, `asked` and `window_right`; `facts`, how many
            were `asked`, and `recalled` by the full cache; `window`, tokens; `command` that made the gates; `licence`
            in words; `machine`. Any of them may be missing.
    """
    losses = "\n".join(
        f"| {text_of(row)} | {row['target']:g} | {row['footprint']:.3f} | {row['delta_nll']:+.4f} "
        f"({row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}) | {_number(row['window_delta_nll'], '+.4f')} "
        f"| {row['windows']} |"
        for row in report.get("texts", [])
    )
    facts = "\n".join(
        f"| {row['target']:g} | {row['footprint']:.3f} | {row['right']:.0%} | {_number(row['window_right'], '.0%')} "
        f"| {row['asked']} |"
        for row in report.get("recall", [])
    )
    parts = []
    if losses:
        parts.append(
            "Loss above the full cache's (ΔNLL, nats a token, 95 % interval over documents) on "
            f"{measured_on(report['texts'])} of {report.get('window', '?')} tokens. *Kept* is the share of a full "
            "cache's keys, with prices solved on training texts of the same length.\n\n| text | asked for | kept "
            f"| ΔNLL | sliding window that keeps as much | windows |\n|---|---|---|---|---|---|\n{losses}\n"
        )
    if facts:
        parts.append(
            "Facts stated once and asked for at the end of a text, of those that the full cache recalls.\n\n"
            f"| asked for | kept | recalled | sliding window | facts |\n|---|---|---|---|---|\n{facts}\n"
        )
    if (none := no_facts(report)) is not None:
        parts.append(f"No recall was measured: {none}.\n")
    if report.get("command"):
        parts.append(f"Made by:\n\n```bash\n{report['command']}\n```\n")
    if report.get("licence"):
        parts.append(f"Licence: {report['licence']}\n")
    if report.get("machine"):
        parts.append(f"Measured with {', '.join(f'{k} {v}' for k, v in report['machine'].items())}.\n")
    return "\n" + "\n".join(parts)


def _number(value: float | None, layout: str) -> str:
    return "" if value is None else format(value, layout)
