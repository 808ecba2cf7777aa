"""`python -m eval anchors`: the share of each layer's attention that goes to each kind of token."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from torch import Tensor

from eval.common.console import make_console
from eval.common.contender_styles import BLACK, COLOURS
from eval.common.figures import WIDE, legend_beside, new_figure, styled
from eval.common.options import Model, Texts
from eval.common.results import machine, save_picture, write_result, write_tables
from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import check_window
from smartkv.models.observation import observe_attention
from smartkv.sparsity.anchors import CLASSES, token_classes
from smartkv.texts.windows import plan_windows

SINK, RECENT = "sink", "recent"  # kinds by place; all others are kinds by what the token is
NAMES = (SINK, RECENT, *CLASSES)


class _Shares:
    """Sums over one text of the attention that goes to each kind of key, and of the number of keys of each kind.

    Args:
        layers: of the model.
        kinds: class of each token, int64 `[tokens]`, an index into `CLASSES`.
        sinks: tokens at the start that count as sinks.
        recent: latest tokens before a query that count as recent.
        first_query: the first query that is counted.
    """

    def __init__(self, layers: int, kinds: Tensor, sinks: int, recent: int, first_query: int) -> None:
        self.kinds, self.sinks, self.recent, self.first_query = kinds, sinks, recent, first_query
        self.attention = torch.zeros(layers, len(NAMES), dtype=torch.float64)
        self.keys = torch.zeros(len(NAMES), dtype=torch.float64)

    def on_keys(self, layer: int, keys: Tensor) -> None:
        return

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        return

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        queries, keys = probabilities.shape[2:]
        query = torch.arange(first_query, first_query + queries)[:, None]
        key = torch.arange(keys)
        kind = (self.kinds[:keys] + 2).expand(queries, keys).clone()
        kind[query - key < self.recent] = NAMES.index(RECENT)
        kind[:, : self.sinks] = NAMES.index(SINK)
        counted = (query >= self.first_query) & (key <= query)
        mean = (probabilities.mean(dim=(0, 1)).cpu().double() * counted).flatten()
        self.attention[layer] += torch.bincount(kind.flatten(), mean, minlength=len(NAMES))
        if layer == 0:
            self.keys += torch.bincount(kind[counted], minlength=len(NAMES))


@torch.inference_mode()
def anchors(
    out: str,
    texts: Texts = Texts(split="validation", windows=4),  # noqa: B008 - jsonargparse shows it
    window: int = 1024,
    sinks: int = 4,
    recent: int = 64,
    model: Model = Model(),  # noqa: B008
    seed: int = 0,
) -> None:
    """Measure which kinds of tokens receive the attention, by layer.

    A key is a sink (among the first), recent (among the latest before its query), or of the class of what it is:
    special, punctuation, newline, number, start or rest of a word. Beside each share of the attention stands that of
    the keys: a class that gets more than that is looked at more often than chance has it.

    Args:
        out: folder for anchors.json and the picture.
        texts: windows of text to read.
        window: tokens of a window.
        sinks: tokens at the start that count as sinks.
        recent: latest tokens that count as recent.
        model: the frozen language model.
        seed: of the choice of windows.
    """
    console = make_console()
    if texts.windows < 1 or sinks < 0 or recent < 1 or window <= sinks + recent:
        raise SmartKVError(
            "windows and recent must be at least 1, sinks at least 0, and a window longer than sinks and recent tokens "
            f"together, got windows {texts.windows}, recent {recent}, sinks {sinks} and window {window}"
        )
    lm = model.load()
    check_window(lm.model, window)
    plan = plan_windows(texts.sources, {texts.split: texts.windows}, lm.tokenizer, window, 4, seed, console.print)
    classes, first_query = token_classes(lm.tokenizer), window // 4
    attention = torch.zeros(lm.architecture.layers, len(NAMES), dtype=torch.float64)
    keys = torch.zeros(len(NAMES), dtype=torch.float64)
    for ids in track(plan.of_split(texts.split), "Reading", console=console):
        observer = _Shares(lm.architecture.layers, classes[ids.long()], sinks, recent, first_query)
        with observe_attention(lm.model, observer):
            lm.model.base_model(input_ids=ids.long()[None].to(model.device), use_cache=False)
        attention += observer.attention
        keys += observer.keys
    attention, keys = attention / attention.sum(dim=1, keepdim=True), keys / keys.sum()
    present = [kind for kind in range(len(NAMES)) if keys[kind] > 0]
    table = _table(attention, keys, present)
    figures: dict[str, Any] = {
        "units": {
            "attention": "share of a layer's attention, mean over heads and queries",
            "keys": "share of the keys",
        },
        "machine": machine(model.device),
        "classes": [NAMES[kind] for kind in present],
        "keys": keys[present].tolist(),
        "attention": attention[:, present].tolist(),
    }
    settings = {"backbone": model.backbone, "texts": plan.sources, "windows": texts.windows, "window": window}
    settings |= {"split": texts.split, "sinks": sinks, "recent": recent, "dtype": str(lm.model.dtype), "seed": seed}
    folder = Path(out)
    result = write_result(folder, "anchors", settings, figures)
    picture = save_picture(anchors_picture(attention, keys, present, model.backbone), folder / "anchors.png")
    console.print(table)
    for path in (result, write_tables(folder / "anchors.md", [table]), picture):
        console.print(f"  {path}", highlight=False)


def _table(attention: Tensor, keys: Tensor, present: list[int]) -> Table:
    table = Table(title="share of the attention by kind of token")
    table.add_column("layer", justify="right")
    for kind in present:
        table.add_column(NAMES[kind].replace("_", " "), justify="right")
    table.add_row("(keys)", *(f"{float(keys[kind]):.3f}" for kind in present))
    for layer, row in enumerate(attention):
        table.add_row(str(layer), *(f"{float(row[kind]):.3f}" for kind in present))
    table.add_row("mean", *(f"{float(attention[:, kind].mean()):.3f}" for kind in present))
    return table


@styled
def anchors_picture(attention: Tensor, keys: Tensor, present: list[int], backbone: str) -> Figure:
    """Draw the share of each layer's attention that goes to each kind of key, as stacked bars.

    Args:
        attention: shares, float `[layers, kinds]`.
        keys: share of the keys of each kind, float `[kinds]`.
        present: kinds to draw, indices into `NAMES`.
        backbone: the model's name.
    """
    figure = new_figure((WIDE[0] + 0.8, WIDE[1]))
    axes = figure.add_subplot()
    colours = (BLACK, *COLOURS[1:])  # sinks and recent keys as in the diagram of the architecture
    layers, bottom = np.arange(len(attention)), np.zeros(len(attention))
    for place, kind in enumerate(present):
        values = attention[:, kind].numpy()
        label = f"{NAMES[kind].replace('_', ' ')} ({float(keys[kind]):.1%} of the keys)"
        axes.bar(layers, values, bottom=bottom, width=0.9, label=label, color=colours[place % len(colours)])
        bottom += values
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the attention")
    axes.set_ylim(0, 1)
    axes.set_title(f"{backbone}: where the attention goes")
    axes.grid(False)
    legend_beside(figure, axes, reverse=True)  # as the bars are stacked
    return figure
