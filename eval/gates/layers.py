"""`python -m eval layers`: how far back each layer and head looks, from harvested labels."""

from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table
from torch import Tensor

from eval.common.console import make_console
from eval.common.figures import heads_heatmap, lines_by_layer
from eval.common.results import save_picture, write_result, write_tables
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest, RowBlock
from smartkv.texts.sources import RECALL


@torch.inference_mode()
def layers(
    shards: str,
    out: str,
    gates: str | None = None,
    threshold: float = 0.05,
    windows: list[int] = [32, 128, 512],  # noqa: B006 - jsonargparse shows it; never changed
    split: str = "validation",
) -> None:
    """Measure which layers are local, and which heads look back at facts that are asked for.

    Args:
        shards: folder that a harvest made.
        out: folder for layers.json and the pictures.
        gates: folder of gates that predict log4 lifespan, for the longest lives that they predict. Null: none.
        threshold: attention probability that counts as a hit; one of those harvested.
        windows: tokens; what is hit at a greater age would be lost by a window of that size.
        split: train, validation or test.
    """
    console = make_console()
    manifest = Manifest.read(shards)
    bank = None if gates is None else GateBank.from_pretrained(gates)
    if bank is not None:
        manifest.fingerprint.check(bank.fingerprint, f"the gates in {gates}")
        if bank.details.get("target", "log4 lifespan") != "log4 lifespan":
            raise SmartKVError(
                f"the gates in {gates} predict {bank.details['target']}: give gates that predict log4 lifespan"
            )
    rows = LabelledKeys(manifest, threshold)
    manifest.verify(manifest.of_split(split))
    if not windows or min(windows) < 1 or max(windows) >= rows.follow_up:
        raise SmartKVError(f"windows must lie between 1 and the follow-up of {rows.follow_up} tokens, got {windows}")
    lives: dict[bool, list[Tensor]] = {True: [], False: []}  # by whether the window asks for facts
    futures, predicted = [], []
    for block in track(rows.blocks(split), "Reading shards", console=console):
        labels = rows.labels(block)
        lives[_asks_for_facts(rows, block)].append((labels.log4_lifespan * 2).exp2().round())
        if labels.future_attention is not None:
            futures.append(labels.future_attention.nanmean(dim=-1))
        if bank is not None:
            predicted.append(bank.read(bank(rows.checked_keys(block).float())))
    shape = (manifest.fingerprint.layers, manifest.fingerprint.kv_heads)
    plain, asking = (torch.cat(parts, dim=1) if parts else None for parts in (lives[False], lives[True]))
    both = torch.cat([part for part in (plain, asking) if part is not None], dim=1)
    heads = {f"hit_beyond_{window}": (both > window).double().mean(dim=1) for window in windows}
    heads["lifespan_median"], heads["lifespan_90"] = (both.quantile(q, dim=1) for q in (0.5, 0.9))
    for age, values in zip(manifest.spec.ages, torch.stack(futures).mean(dim=0) if futures else [], strict=True):
        heads[f"future_attention_from_{age}"] = values
    if plain is not None and asking is not None:
        longest = max(windows)
        heads["needle"] = (asking > longest).double().mean(dim=1) - (plain > longest).double().mean(dim=1)
    if predicted:
        heads["predicted_cap"] = (torch.cat(predicted, dim=1).quantile(0.99, dim=1) * 2).exp2()
    grids = {name: values.double().view(shape) for name, values in heads.items()}
    folder = Path(out)
    settings = {"shards": shards, "gates": gates, "threshold": threshold, "windows": windows, "split": split}
    figures = {"units": _units(windows), "keys_a_head": both.shape[1], "texts": manifest.sources}
    figures |= {"by_head": {name: grid.tolist() for name, grid in grids.items()}}
    result = write_result(folder, "layers", settings, figures)
    table = _table(grids)
    console.print(table)
    for path in [result, write_tables(folder / "layers.md", [table]), *_pictures(folder, grids, windows)]:
        console.print(f"  {path}", highlight=False)


def _asks_for_facts(rows: LabelledKeys, block: RowBlock) -> bool:
    """Return whether the block's window is of a source whose windows ask for facts that they stated."""
    document = int(rows.document(block)[0])
    return rows.manifest.documents[document].partition("/")[0] in RECALL


def _units(windows: list[int]) -> dict[str, str]:
    return {
        "hit_beyond_…": "share of keys that a query older by more than so many tokens hits",
        "lifespan_…": "tokens, capped at the follow-up",
        "future_attention_from_…": "mean probability a query, from that age on",
        "needle": f"hit_beyond_{max(windows)} in windows that ask for facts, minus that in plain text",
        "predicted_cap": "tokens; 99 % of the head's predicted lifespans are shorter",
    }


def _table(grids: dict[str, Tensor]) -> Table:
    table = Table(title="by layer, mean over KV heads")
    table.add_column("layer", justify="right")
    for name in grids:
        table.add_column(name.replace("_", " "), justify="right")
    for layer in range(len(next(iter(grids.values())))):
        figures = [float(grid[layer].mean()) for grid in grids.values()]
        table.add_row(str(layer), *(f"{figure:.4f}" if abs(figure) < 1 else f"{figure:.0f}" for figure in figures))
    return table


def needle_title(window: int) -> str:
    """Return the title of the picture of heads that look back at facts that are asked for."""
    return f"Keys hit beyond {window} tokens: text that asks for facts, less plain text"


def _pictures(folder: Path, grids: dict[str, Tensor], windows: list[int]) -> list[Path]:
    count = len(next(iter(grids.values())))
    shown: dict[str, Any] = {
        f"beyond {window} tokens": grids[f"hit_beyond_{window}"].mean(dim=1).tolist() for window in windows
    }
    title, share = "Keys that are looked at again after a window, by layer", "share of keys"
    pictures = [save_picture(lines_by_layer(shown, range(count), title, share), folder / "beyond_windows.png")]
    titles = {
        f"hit_beyond_{windows[len(windows) // 2]}": (f"Keys hit beyond {windows[len(windows) // 2]} tokens", share),
        "needle": (needle_title(max(windows)), share),
        "predicted_cap": ("Longest lives that gates predict (99 %)", "tokens"),
    }
    for name, (title, label) in titles.items():
        if name in grids:
            grid = grids[name].numpy()
            low = min(0.0, float(grid.min()))
            pictures.append(
                save_picture(heads_heatmap(grid, range(count), title, label, low), folder / f"{name}_by_head.png")
            )
    return pictures
