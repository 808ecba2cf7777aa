"""What is expected of quantised caches, and whether the figures of a run are so."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

NOMINAL = {"FP16": 1.0, "INT8": 0.5, "INT4": 0.25, "KIVI": 0.1875, "KIVI2": 0.125, "KIVI4": 0.25}  # ratio_payload
ADAPTIVE = "SmartKV"
AROUND = 0.2  # adaptive precision holds its budget give or take this share of it: 0.40 to 0.60 for 0.5

Figures = dict[str, dict[str, Any]]  # baseline -> figure -> value


@dataclass(frozen=True)
class Judgement:
    """Something that was expected.

    Attributes:
        fine: whether it is so; None: a remark, which judges nothing.
        text: what was expected, with the figures.
    """

    fine: bool | None
    text: str

    def line(self) -> str:
        """Return a line of rich markup."""
        if self.fine is None:
            return self.text
        return ("[green]as expected[/]: " if self.fine else "[red]NOT as expected[/]: ") + self.text


def judge(figures: Figures, budget: float, tokens: int) -> list[Judgement]:
    """Judge the figures of a run, as far as it has them: ratios by their size, errors by their order.

    Args:
        figures: of each baseline.
        budget: of adaptive precision.
        tokens: of a text.
    """
    judgements = list(_payloads(figures))
    if ADAPTIVE in figures:
        judgements += _adaptive_ratio(figures[ADAPTIVE], budget, tokens)
    orders = [("ratio_stored", "INT4", "INT8", "FP16")]
    orders += [(f"error_{what}", "FP16", "INT8", "INT4") for what in ("key", "value", "output")]
    if ADAPTIVE in figures and NOMINAL["INT4"] < figures[ADAPTIVE]["ratio_payload"] < NOMINAL["INT8"]:
        orders.append(("error_output", "INT8", ADAPTIVE, "INT4"))  # it has more bits than the one, fewer than the other
    for key, *names in orders:
        judgements += _order(figures, key, *names)
    return [*judgements, *_kivi(figures)]


def _payloads(figures: Figures) -> Iterator[Judgement]:
    for name, row in figures.items():
        if name in NOMINAL:
            found, want = row["ratio_payload"], NOMINAL[name]
            yield Judgement(abs(found - want) < 1e-6, f"ratio_payload of {name} is {want:g} ({found:.4f})")


def _adaptive_ratio(row: dict[str, Any], budget: float, tokens: int) -> Iterator[Judgement]:
    """Judge what adaptive precision stores of encoded tokens, and remark what exact ones add in a short text."""
    low, high = budget * (1 - AROUND), budget * (1 + AROUND)
    stored, encoded, exact = row["ratio_stored"], row["ratio_encoded"], row["exact_tokens"]
    within = f"ratio_stored of {ADAPTIVE} is {low:.2f} to {high:.2f}"
    if encoded is None:
        yield Judgement(None, f"{within} where tokens are encoded: a text of {tokens:,} tokens is exact as a whole")
    elif stored <= high:
        yield Judgement(low <= stored, f"{within} ({stored:.4f})")
    else:
        yield Judgement(low <= encoded <= high, f"{within} for the tokens that are encoded ({encoded:.4f})")
        short = f"the latest {exact:,} of {tokens:,} tokens are exact, so {ADAPTIVE} stores {stored:.4f} in all"
        yield Judgement(None, f"the text is short: {short}")


def _order(figures: Figures, key: str, *names: str) -> Iterator[Judgement]:
    """Judge whether a figure rises from name to name, of those that have it."""
    values = {name: figures[name][key] for name in names if key in figures.get(name, {})}
    if len(values) > 1:
        shown = f"{key} {' < '.join(values)} ({', '.join(f'{value:.4f}' for value in values.values())})"
        yield Judgement(all(a < b for a, b in pairwise(values.values())), shown)


def _kivi(figures: Figures) -> Iterator[Judgement]:
    if "KIVI" in figures and "INT4" in figures and "error_key" in figures["KIVI"]:
        kivi, int4 = figures["KIVI"], figures["INT4"]
        yield Judgement(
            None,
            f"KIVI's keys have 2 bits: their error is {kivi['error_key']:.3f} (INT4 {int4['error_key']:.3f}), that of "
            f"the output, whose values have 4, {kivi['error_output']:.3f} (INT4 {int4['error_output']:.3f})",
        )
