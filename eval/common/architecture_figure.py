"""The architecture diagram: from text to gates, and from gates to a cache that evicts."""

from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from eval.common.contender_styles import BLACK, BLUE, STYLES
from eval.common.figures import styled

WIDTH, HEIGHT = 2.35, 1.3  # of a box, in inches
COLUMNS = (0.35, 3.15, 5.95, 8.75)  # left edges of the boxes
ROWS = (4.95, 2.45)  # lower edges of the boxes
TRAIN = [
    ("Text", "books, code,\nyour own files", "smartkv/texts"),
    ("Keys and labels", "the frozen LM reads it:\nkeys before RoPE, lifespans", "smartkv/labels"),
    ("Shards", "safetensors,\na killed harvest goes on", "smartkv/shards"),
    ("Gates", "one small MLP a KV head:\nwhat is this key worth?", "smartkv/gates"),
]
USE = [
    ("Policy", "windows, and one price\nfor a KV footprint", "smartkv/policies"),
    ("Cache", "each key has a time to live;\nits memory is then freed", "smartkv/cache"),
    ("model.generate", "a plain transformers model;\nno attention weights asked", "transformers"),
    ("Measurement", "ΔNLL, footprint, bytes,\nrecall, speed", "eval"),
]


@styled
def architecture_figure() -> Figure:
    """Draw the road from text through gates and policy to the cache and its measurement."""
    figure = Figure(figsize=(11.45, 6.85), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 11.45)
    axes.set_ylim(0, 6.85)
    axes.set_axis_off()
    axes.text(COLUMNS[0], 6.5, "Once for a model: learn what keys are worth", fontsize=13, weight="bold", va="center")
    axes.text(COLUMNS[0], 4.55, "At inference: keep what is worth its price", fontsize=13, weight="bold", va="center")
    for row, boxes in zip(ROWS, (TRAIN, USE), strict=True):
        for left, (title, text, place) in zip(COLUMNS, boxes, strict=True):
            _box(axes, left, row, title, text, place, ours=title in ("Gates", "Policy", "Cache"))
        for left, right in pairwise(COLUMNS):
            _arrow(axes, (left + WIDTH + 0.05, row + HEIGHT / 2), (right - 0.05, row + HEIGHT / 2))
    _gates_to_inference(axes)
    _one_head(axes)
    return figure


def _box(axes: Axes, left: float, bottom: float, title: str, text: str, place: str, ours: bool) -> None:
    edge, face = (BLUE, "#E3F0F8") if ours else ("#555555", "#F4F4F4")
    shape = FancyBboxPatch(
        (left, bottom), WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", edgecolor=edge, facecolor=face
    )
    shape.set_linewidth(2.0 if ours else 1.2)
    axes.add_patch(shape)
    middle = left + WIDTH / 2
    axes.text(middle, bottom + 1.06, title, ha="center", va="center", fontsize=13, weight="bold", color=BLACK)
    axes.text(middle, bottom + 0.63, text, ha="center", va="center", fontsize=10, color=BLACK, linespacing=1.25)
    axes.text(middle, bottom + 0.18, place, ha="center", va="center", fontsize=9, color="#666666", family="monospace")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#555555") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0})


def _gates_to_inference(axes: Axes) -> None:
    """The gates go into the cache, and the policy's price is solved with them."""
    gates, level = COLUMNS[3] + WIDTH / 2, 4.22
    policy, cache = COLUMNS[0] + WIDTH / 2, COLUMNS[1] + WIDTH / 2
    axes.plot([gates, gates, policy], [ROWS[0], level, level], color=BLUE, linewidth=1.8, solid_joinstyle="round")
    for place in (policy, cache):
        _arrow(axes, (place, level), (place, ROWS[1] + HEIGHT + 0.02), BLUE)


def _one_head(axes: Axes) -> None:
    """The keys of one KV head, by age."""
    kinds = "SSSS" + "kdddkddddddkkddkdddddk" + "wwwwwwww"
    faces = {"S": BLACK, "k": BLUE, "d": "white", "w": STYLES["window"].colour}
    left, bottom = COLUMNS[0], 1.05
    side = (COLUMNS[3] + WIDTH - left) / len(kinds)
    axes.text(left, 1.85, "One KV head of the cache, oldest key first", fontsize=11.5, weight="bold", va="center")
    for place, kind in enumerate(kinds):
        corner = (left + place * side + 0.03, bottom)
        _key(axes, corner, side - 0.06, 0.42, faces[kind], evicted=kind == "d")
    legend = [("S", "sinks: always kept"), ("k", "worth more than the price: kept"), ("d", "worth less: evicted")]
    legend += [("w", "window: too young to judge")]
    at = left
    for (kind, text), step in zip(legend, (2.2, 3.35, 2.35, 0.0), strict=True):
        _key(axes, (at + 0.03, 0.46), 0.2, 0.2, faces[kind], evicted=kind == "d")
        axes.text(at + 0.34, 0.56, text, fontsize=10.5, va="center", color=BLACK)
        at += step


def _key(axes: Axes, corner: tuple[float, float], width: float, height: float, face: str, evicted: bool) -> None:
    """Draw one key; an evicted one is an empty place."""
    edge, line = ("#AAAAAA", ":") if evicted else (face, "-")
    axes.add_patch(Rectangle(corner, width, height, facecolor=face, edgecolor=edge, linestyle=line))
