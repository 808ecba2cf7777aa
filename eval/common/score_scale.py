"""What a gate's score means to a reader: its unit, its words, and the range of its colours."""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from smartkv.gates.bank import GateBank
from smartkv.gates.objectives import FutureAttention, objective_of_target
from smartkv.policies.hybrid import LOG4_TARGET

LIFESPAN_STEPS = 40.0  # codes a factor of 4, which are 3.5 % each
LARGEST_CODE = 254  # of a score on the page
OUTLIERS = 0.01  # share of the scores at each end whose colour is that of the end
TICKS = 6


@dataclass(frozen=True)
class ScoreScale:
    """How a score is shown: as the amount `base ** score`, in colours that range from `bottom` to `top`.

    Attributes:
        base: of the amount; None: the score itself is the amount.
        unit: of the amount; "" where it has none.
        said: words before the amount of a key, such as "predicted to live".
        caption: what the colours show.
        judged: what a gate does when it reads a key.
        bottom, top: scores at the two ends of the colours.
        low: score of the page's code 0.
        steps: codes of the page in one unit of the score.
        ages: in tokens, at which gates judge a key; empty for gates that judge it once.
    """

    base: float | None
    unit: str
    said: str
    caption: str
    judged: str
    bottom: float = 0.0
    top: float = 5.0
    low: float = 0.0
    steps: float = LIFESPAN_STEPS
    ages: tuple[int, ...] = ()

    @classmethod
    def of(cls, gates: GateBank | None) -> "ScoreScale":
        """Return the scale of the scores that a policy compares with its price; without gates that of lifespans."""
        if gates is None:
            return LIFESPAN
        if gates.ages:
            return replace(WORTH, ages=gates.ages, caption=f"worth at age {gates.ages[-1]:,}, nats a token")
        target = gates.details.get("target", LOG4_TARGET)
        objective = objective_of_target(target, gates.details.get("objective", {}))
        if target == LOG4_TARGET or (objective is not None and objective.in_log4):
            return LIFESPAN
        return ATTENTION if target == FutureAttention.target else replace(PLAIN, caption=f"predicted {target}")

    def fitted(self, scores: Tensor, prices: list[float]) -> "ScoreScale":
        """Return the scale with codes for all scores of a text, and colours for most of them and the policy's prices.

        Lifespans keep theirs, with colours from 1 to 1,024 tokens, so that pages can be compared.

        Args:
            scores: of any shape; NaN: unknown.
            prices: finite, in the unit of the scores.
        """
        known = scores[scores.isfinite()].double()
        if self.judged == LIFESPAN.judged or not len(known):
            return self
        low, high = float(known.min()), float(known.max())
        ordered = known.sort().values
        few = int(OUTLIERS * len(known))  # at each end, which would leave few colours to the others
        usual = [*ordered[[few, -1 - few]].tolist(), *prices]
        bottom, top = math.floor(min(usual)), math.ceil(max(usual))
        steps = LARGEST_CODE / max(high - low, 1e-6)
        return replace(self, bottom=float(bottom), top=float(max(top, bottom + 1)), low=low, steps=steps)

    def amount(self, score: float) -> str:
        """Return the number that is shown for a score."""
        value = score if self.base is None else self.base ** min(score, 300.0)
        return f"{value:,.0f}" if abs(value) >= 9.95 else f"{value:.2g}"

    def describe_price(self, price: float) -> str:
        """Return a price in words, such as "price 2.29 (predicted to live 24 tokens)"."""
        asked = f", asked at the ages of {_listed(self.ages)} tokens" if self.ages else ""
        amount = f"{self.said} {self.amount(price)} {self.unit}".rstrip()
        return f"price {price:.2f} ({amount}{asked})"

    def to_dict(self) -> dict[str, Any]:
        """Return what the page's script reads; `ticks` are places from 0 to 1 along the colours, and their amounts."""
        places = [tick / (TICKS - 1) for tick in range(TICKS)]
        ticks = [(place, self.amount(self.bottom + place * (self.top - self.bottom))) for place in places]
        shown = ("base", "unit", "said", "caption", "bottom", "top", "low", "ages")
        return {name: getattr(self, name) for name in shown} | {"ticks": ticks}


def _listed(ages: tuple[int, ...]) -> str:
    *first, last = (f"{age:,}" for age in ages)
    return f"{', '.join(first)} and {last}" if first else last


LIFESPAN = ScoreScale(
    base=4.0,
    unit="tokens",
    said="predicted to live",
    caption="predicted time to live, tokens",
    judged="predicts how long later tokens will look at it",
)
WORTH = ScoreScale(
    base=math.e,
    unit="nats",
    said="worth",
    caption="worth, nats a token",
    judged="predicts what the model would lose without it, from each of some ages on",
)
ATTENTION = ScoreScale(
    base=math.e,
    unit="of the attention",
    said="predicted to get",
    caption="predicted share of later attention",
    judged="predicts how much later tokens will look at it",
)
PLAIN = ScoreScale(base=None, unit="", said="scored", caption="score", judged="scores it")
