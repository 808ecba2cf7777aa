"""`python -m eval anchors`: which kinds of tokens the attention goes to, by layer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from torch import Tensor

from eval.common.console import make_console
from eval.common.contender_styles import COLOURS
from eval.common.figures import WIDE, legend_beside, new_figure, styled
from eval.common.options import Model, Texts
from eval.common.results import machine, save_picture, write_result, write_tables
from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import check_window
from smartkv.models.observation import observe_attention
from smartkv.sparsity.anchors import CLASSES, token_classes
from smartkv.texts.windows import plan_windows

SINK, RECENT = "sink", "recent"  # besides the classes of what a token is: where it stands
NAMES = (SINK, RECENT, *CLASSES)


class _Shares:
    """Adds up, layer by layer, the attention that goes to each kind of key, and how many of the keys are of it."""

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
    """Which kinds of tokens receive the attention, by layer: what is worth keeping as an anchor.

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
        raise SmartKVError("windows and recent must be at least 1, and windows longer than sinks and recent tokens")
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
    found = [n for n in range(len(NAMES)) if keys[n] > 0]
    table = _table(attention, keys, found)
    figures: dict[str, Any] = {
        "units": {
            "attention": "share of a layer's attention, mean over heads and queries",
            "keys": "share of the keys",
        },
        "machine": machine(model.device),
        "classes": [NAMES[n] for n in found],
        "keys": keys[found].tolist(),
        "attention": attention[:, found].tolist(),
    }
    settings = {"backbone": model.backbone, "texts": plan.sources, "windows": texts.windows, "window": window}
    settings |= {"split": texts.split, "sinks": sinks, "recent": recent, "dtype": str(lm.model.dtype), "seed": seed}
    folder = Path(out)
    result = write_result(folder, "anchors", settings, figures)
    picture = save_picture(anchors_picture(attention, keys, found, model.backbone), folder / "anchors.png")
    console.print(table)
    for path in (result, write_tables(folder / "anchors.md", [table]), picture):
        console.print(f"  {path}", highlight=False)


def _table(attention: Tensor, keys: Tensor, found: list[int]) -> Table:
    table = Table(title="share of the attention by kind of token")
    table.add_column("layer", justify="right")
    for n in found:
        table.add_column(NAMES[n].replace("_", " "), justify="right")
    table.add_row("(keys)", *(f"{float(keys[n]):.3f}" for n in found))
    for layer, row in enumerate(attention):
        table.add_row(str(layer), *(f"{float(row[n]):.3f}" for n in found))
    table.add_row("mean", *(f"{float(attention[:, n].mean()):.3f}" for n in found))
    return table


@styled
def anchors_picture(attention: Tensor, keys: Tensor, found: list[int], backbone: str) -> Figure:
    figure = new_figure((WIDE[0] + 0.8, WIDE[1]))
    axes = figure.add_subplot()
    layers, bottom = np.arange(len(attention)), np.zeros(len(attention))
    for place, n in enumerate(found):
        values = attention[:, n].numpy()
        label = f"{NAMES[n].replace('_', ' ')} ({float(keys[n]):.1%} of the keys)"
        axes.bar(layers, values, bottom=bottom, width=0.9, label=label, color=COLOURS[place % len(COLOURS)])
        bottom += values
    axes.set_xlabel("layer")
    axes.set_ylabel("share of the attention")
    axes.set_ylim(0, 1)
    axes.set_title(f"{backbone}: where the attention goes")
    axes.grid(False)
    legend_beside(figure, axes, reverse=True)  # as the bars are stacked
    return figure
