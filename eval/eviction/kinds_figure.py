"""The picture of `python -m eval kinds`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from eval.common.contender_styles import contender_styles
from eval.common.figures import legend_beside, new_figure, styled


@dataclass
class KindBar:
    """What the picture shows of one contender on one kind of text.

    Attributes:
        contender: folder or name of the gates, or `window`.
        kind: name of the kind of text.
        target: footprint.
        delta_nll: mean NLL − the full cache's, nats a token.
        interval: of `delta_nll`, 95 %; None: there is none.
    """

    contender: str
    kind: str
    target: float
    delta_nll: float
    interval: Sequence[float] | None


def short_names(contenders: Sequence[str]) -> dict[str, str]:
    """Return the last part of each folder, where it tells the contenders apart; else the whole path."""
    short = [Path(name).name for name in contenders]
    return dict(zip(contenders, short if len(set(short)) == len(short) else contenders, strict=True))


@styled
def kinds_picture(bars: Sequence[KindBar]) -> Figure:
    """Draw the loss on each kind of text, a panel for each footprint and a bar for each contender."""
    kinds, targets = list(dict.fromkeys(bar.kind for bar in bars)), sorted({bar.target for bar in bars}, reverse=True)
    contenders = list(dict.fromkeys(bar.contender for bar in bars))
    names = short_names(contenders)
    if len(contenders) == 2:
        names = {name: name if name == "window" else "gates" for name in contenders}  # one colour for "the gates"
    styles = contender_styles(names.values())
    figure = new_figure((max(7.0, 0.42 * len(kinds) * len(contenders) + 3.2), 3.0 * len(targets) + 0.8))
    panels = figure.subplots(len(targets), 1, squeeze=False, sharex=True)[:, 0]
    width = 0.8 / len(contenders)
    for axes, target in zip(panels, targets, strict=True):
        for number, contender in enumerate(contenders):
            own = [bar for bar in bars if (bar.contender, bar.target) == (contender, target)]
            places = [kinds.index(bar.kind) + (number + 0.5) * width - 0.4 for bar in own]
            ends = [bar.interval or (bar.delta_nll, bar.delta_nll) for bar in own]
            errors = [[bar.delta_nll - low for bar, (low, _) in zip(own, ends, strict=True)],
                      [high - bar.delta_nll for bar, (_, high) in zip(own, ends, strict=True)]]  # fmt: skip
            style = {**styles[names[contender]].bar(), "yerr": errors, "ecolor": "#222222", "capsize": 3}
            axes.bar(places, [bar.delta_nll for bar in own], 0.9 * width, **style)
        axes.set_ylabel(f"ΔNLL at {target:g} kept,\nnats a token")
        axes.grid(axis="x", visible=False)
    panels[-1].set_xticks(range(len(kinds)), kinds)
    panels[-1].set_xlabel("kind of text")
    legend_beside(figure, panels[0], title="evicted by", alignment="left")
    return figure
