"""The picture of `python -m eval gains`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from eval.common.contender_styles import contender_label, contender_styles
from eval.common.figures import legend_beside, new_figure, styled


@dataclass
class GainBar:
    """What the picture shows of one policy at one footprint, on one kind of text, before and after a training.

    Attributes:
        run: folder of the trained model's `compare.json`.
        text: name of the kind of text.
        contender: the policy under which both models were read.
        target: footprint that was asked for.
        cost_before: NLL under eviction less NLL with a full cache before the training, nats a token.
        fall: share of that cost that the training took away. None where that cost is not above 0 (95 %).
        interval: of `fall`, 95 % by bootstrap over documents. None with it.
    """

    run: str
    text: str
    contender: str
    target: float
    cost_before: float
    fall: float | None
    interval: Sequence[float] | None


@styled
def gains_picture(gains: Sequence[GainBar]) -> Figure:
    """Draw what is left of the cost before, by policy and run, with its interval.

    A run has the colour of the policy that its folder is named after. There is no bar where nothing was lost before.
    """
    groups = list(dict.fromkeys((gain.text, gain.contender, gain.target) for gain in gains))
    runs = list(dict.fromkeys(gain.run for gain in gains))
    short = [Path(run).name for run in runs]
    names = dict(zip(runs, short if len(set(short)) == len(short) else runs, strict=True))
    styles = contender_styles(names.values())
    figure = new_figure((max(7.0, 0.5 * len(groups) * len(runs) + 3.2), 4.4))
    axes, width = figure.add_subplot(), 0.8 / len(runs)
    axes.axhline(100, color="#555555", linestyle=":", label="before training")
    for gain in gains:
        if gain.fall is None or gain.interval is None:
            continue
        number, group = runs.index(gain.run), groups.index((gain.text, gain.contender, gain.target))
        left, (most, least) = 100 * (1 - gain.fall), (100 * (1 - fall) for fall in gain.interval)
        bar = {**styles[names[gain.run]].bar(), "yerr": [[left - least], [most - left]], "ecolor": "#222222"}
        axes.bar(group + (number + 0.5) * width - 0.4, left, 0.9 * width, capsize=3, **bar)
    costs = {(gain.text, gain.contender, gain.target): gain.cost_before for gain in gains}
    labels = [
        f"{contender_label(contender)}\nat {target:g}, {text}\n{costs[text, contender, target]:.4f} nats a token before"
        for text, contender, target in groups
    ]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_ylabel("what is left of the cost of eviction, %")
    axes.set_xlabel("evicted by, and what that cost before")
    axes.grid(axis="x", visible=False)
    legend_beside(figure, axes, title="trained under", alignment="left")
    return figure
