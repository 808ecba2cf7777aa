"""`python -m eval calibrate`: a model's architecture, its attention on real text, and its labels by threshold."""

from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from torch import Tensor

from eval.common.console import make_console
from eval.common.figures import heads_heatmap, lines_by_layer, survival
from eval.common.options import Model
from eval.common.results import save_picture, write_result
from smartkv.labels.attention_distribution import (
    PERCENTILES,
    SUGGESTED,
    AttentionDistribution,
    AttentionDistributionObserver,
)
from smartkv.labels.lifespans import LabelSpec, check_window, log4_lifespan
from smartkv.models.key_site_check import check_key_site
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import plan_windows

SHOWN = [0.05, 0.1]  # attention probabilities above which the share of the pairs is always given


def calibrate(
    out: str,
    sources: list[SourceConfig],
    model: Model = Model(),  # noqa: B008
    window: int = 2048,
    windows: int = 4,
    thresholds: tuple[float, ...] = (0.02, 0.05, 0.11),
    follow_up: int | None = None,
    sinks: int = 4,
    seed: int = 0,
) -> None:
    """Show a model's modules, and measure its attention on validation text.

    Args:
        out: folder for calibrate.json and the pictures.
        sources: the texts, as in configs/harvest.
        model: the frozen language model.
        window: tokens a window.
        windows: validation windows to read.
        thresholds: attention probabilities whose labels are compared.
        follow_up: tokens; labels are of keys with this horizon and capped there. Null: half a window.
        sinks: tokens at the start of a window that are left out of the labels.
        seed: of the choice of windows.
    """
    console = make_console()
    spec = LabelSpec(tuple(thresholds), (), follow_up or window // 2)
    lm = model.load()
    check_window(lm.model, window)
    site = check_key_site(lm)
    plan = plan_windows(sources, {"validation": windows}, lm.tokenizer, window, seed=seed, say=console.print)
    observer = AttentionDistributionObserver(lm.architecture.layers, spec, sinks)
    for tokens in track(plan.tokens, "Reading attention", console=console):
        observer.run(lm, tokens)

    layers = [d.summary(SHOWN) for d in observer.distributions]
    overall = AttentionDistribution.merged(observer.distributions).summary(SHOWN)
    lifespans = torch.cat([w[..., sinks : window - spec.follow_up] for w in observer.lifespans], dim=-1)
    labels = {str(t): _label_figures(row, spec.follow_up) for t, row in zip(thresholds, lifespans, strict=True)}
    arch = lm.architecture
    attention_map = [1, arch.query_heads, window, window]
    architecture = {**asdict(arch), "gates": arch.gates, "pre_rope_key": site, "attention_map": attention_map}
    folder = Path(out)
    result = write_result(
        folder,
        "calibrate",
        {
            "backbone": model.backbone,
            "dtype": str(lm.model.dtype),
            "window": window,
            "windows": len(plan.tokens),
            "thresholds": list(thresholds),
            "follow_up": spec.follow_up,
            "sinks": sinks,
            "seed": seed,
            "texts": plan.sources,
        },
        {
            "architecture": architecture,
            "attention_note": "probabilities of every causal (query, key) pair and query head, sinks included",
            "attention": {"all_heads": overall, "layers": layers},
            "labels": labels,
        },
    )
    pictures = [
        save_picture(_attention_picture(layers), folder / "attention_by_layer.png"),
        save_picture(_lifespan_picture(lifespans, thresholds, spec.follow_up), folder / "lifespans_by_threshold.png"),
        save_picture(_heatmap(lifespans, thresholds, spec.follow_up), folder / "lifespans_by_head.png"),
    ]
    console.print(str(lm.model), highlight=False, markup=False)
    console.print(
        f"{model.backbone} ({arch.model_type}): {arch.layers} layers, {arch.query_heads} query heads, "
        f"{arch.kv_heads} KV heads of {arch.head_dim} dims: {arch.gates} gates\n"
        f"pre-RoPE key: output of {site['module']}, (kv_heads, tokens, head_dim) = {tuple(site['shape'])}, "
        "checked on the module itself\n"
        f"attention map of a layer: (batch, query_heads, queries, keys) = {tuple(attention_map)}, "
        "of which only blocks of queries are in memory",
        highlight=False,
    )
    console.print(_attention_table(overall, layers))
    console.print(_label_table(labels, spec.follow_up))
    console.print(_overall_lines(overall), highlight=False)
    for path in [result, *pictures]:
        console.print(f"  {path}", highlight=False)


def _label_figures(lifespan: Tensor, follow_up: int) -> dict[str, object]:
    """Return the figures of one threshold; `lifespan` int32 `[layers, kv_heads, keys]`."""
    target = log4_lifespan(lifespan, follow_up)
    return {
        "mean_log4_lifespan": float(target.mean()),
        "std_log4_lifespan": float(target.std()),
        "share_never_hit_later": float((lifespan == 1).float().mean()),
        "share_past_64": float((lifespan > 64).float().mean()),
        "share_past_256": float((lifespan > 256).float().mean()),
        "share_at_follow_up": float((lifespan >= follow_up).float().mean()),
        "mean_log4_lifespan_by_layer": target.mean(dim=(1, 2)).tolist(),
    }


def _attention_table(overall: dict, layers: list[dict]) -> Table:
    table = Table(title="Attention probabilities over causal pairs")
    rows = [*((str(i), row) for i, row in enumerate(layers)), ("all", overall)]
    for column in ("layer", *(f"p{p:g}" for p in PERCENTILES), "max", "> 0.05", "> 0.1", "sinks"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows:
        if name == "all":
            table.add_section()
        shares = [row["share_above"][f"{t:.4g}"]["pairs"] for t in SHOWN]
        table.add_row(
            name,
            *(f"{row['percentiles'][f'{p:g}']:.0e}" for p in PERCENTILES),
            f"{row['max']:.2f}",
            *(f"{share:.2%}" for share in shares),
            f"{row['share_on_sinks']:.0%}",
        )
    return table


def _overall_lines(overall: dict) -> str:
    suggested = overall["suggested_threshold"]
    lines = [
        f"all heads: min {overall['min']:.2g}, mean {overall['mean']:.2g}, median {overall['median']:.2g}, "
        f"max {overall['max']:.3f}; suggested threshold ({SUGGESTED}th percentile): {suggested:.4f}"
    ]
    for threshold, share in overall["share_above"].items():
        lines.append(f"above {threshold}: {share['pairs']:.2%} of the pairs, {share['attention']:.1%} of the attention")
    return "\n".join(lines)


def _label_table(labels: dict, follow_up: int) -> Table:
    table = Table(title=f"Lifespans by threshold (keys with horizon ≥ {follow_up}, sinks left out)")
    for column in ("threshold", "mean log4", "std", "never hit later", "> 64 tokens", "> 256", f"≥ {follow_up}"):
        table.add_column(column, justify="right")
    for threshold, row in labels.items():
        shares = ("share_never_hit_later", "share_past_64", "share_past_256", "share_at_follow_up")
        table.add_row(
            threshold,
            f"{row['mean_log4_lifespan']:.2f}",
            f"{row['std_log4_lifespan']:.2f}",
            *(f"{row[s]:.1%}" for s in shares),
        )
    return table


def _attention_picture(layers: list[dict]) -> Figure:
    shown = (50, 90, 99, 99.9)
    series = {f"{p:g}th percentile": [row["percentiles"][f"{p:g}"] for row in layers] for p in shown}
    series["mean"] = [row["mean"] for row in layers]
    title = "Attention probability over causal pairs, by layer"
    return lines_by_layer(series, range(len(layers)), title, "attention probability", log=True)


def _lifespan_picture(lifespans: Tensor, thresholds: tuple[float, ...], follow_up: int) -> Figure:
    series = {f"threshold {t:g}": row.numpy() for t, row in zip(thresholds, lifespans, strict=True)}
    return survival(series, follow_up, "How long keys live, by threshold")


def _heatmap(lifespans: Tensor, thresholds: tuple[float, ...], follow_up: int) -> Figure:
    chosen = min(range(len(thresholds)), key=lambda i: abs(thresholds[i] - 0.05))
    values = log4_lifespan(lifespans[chosen], follow_up).mean(dim=-1).numpy()
    title = f"Mean log4 lifespan, threshold {thresholds[chosen]:g}"
    return heads_heatmap(values, range(len(values)), title, "log4 lifespan (tokens)")
