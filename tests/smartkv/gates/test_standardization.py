"""Nulls and moments learn from any number of windows of thousands of heads: what they hold, and what they copy."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smartkv.gates.standardization import Moments
from smartkv.labels.lifespans import log4_lifespan
from smartkv.metrics.nulls import NULLS, RandomNull, TableNull, make_nulls, score_nulls
from smartkv.shards.labelled_keys import LabelledKeys
from tests.models import write_tiny_shards

GATES, ROWS, LONGEST = 6, 40, 64


class LargestMade(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        there = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(out):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in there:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return out


def largest_made(work: Callable[[], Any]) -> int:
    with LargestMade() as seen:
        work()
    return seen.bytes


def window_of(seed: int, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Target `[GATES, ROWS]`, position and token of a made window; short lives are frequent, as they are in truth."""
    generator = torch.Generator().manual_seed(seed)
    lifespan = torch.rand(GATES, ROWS, generator=generator).pow(4).mul(LONGEST).int() + 1
    token = torch.randint(tokens, (ROWS,), generator=generator).int()
    return log4_lifespan(lifespan, LONGEST), torch.arange(ROWS, dtype=torch.int32), token


# -- nulls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NULLS)
def test_a_null_holds_no_more_after_many_windows_than_after_one(name: str) -> None:
    null = make_nulls(GATES, ROWS, tokens=9, longest=LONGEST)[name]
    sizes = []
    for number in range(20):
        null.update(*window_of(number))
        null.predict(*window_of(number)[1:])
        sizes.append(len(pickle.dumps(null)))
    assert max(sizes) == sizes[0]


@pytest.mark.parametrize("name", NULLS)
def test_a_null_gives_all_that_it_holds_to_a_sum_over_processes(name: str) -> None:
    one, other, both = (make_nulls(GATES, ROWS, tokens=9, longest=LONGEST)[name] for _ in range(3))
    for number, nulls in enumerate([(one, both), (other, both), (other, both)]):
        for null in nulls:
            null.update(*window_of(number))
    for mine, its in zip(one.tensors(), other.tensors(), strict=True):
        mine += its
    asked = window_of(9)[1:]
    torch.testing.assert_close(one.predict(*asked), both.predict(*asked))


def test_neither_learning_nor_predicting_copies_the_token_table() -> None:
    null = TableNull(GATES, 10_000, "token_table")
    target, position, token = window_of(0)
    assert largest_made(lambda: null.update(target, position, token)) <= 8 * GATES * ROWS
    assert largest_made(lambda: null.predict(position, token)) <= 8 * GATES * ROWS


def test_a_random_draw_is_one_from_the_sorted_pool_of_a_head_s_labels() -> None:
    null, targets = RandomNull(GATES, LONGEST, seed=3), []
    for number in range(5):
        target, position, token = window_of(number)
        null.update(target, position, token)
        targets.append(target)
    pool = torch.cat(targets, dim=1).sort(dim=1).values
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 7)
    drawn = torch.randint(pool.shape[1], (GATES, ROWS), generator=generator)
    assert torch.equal(null.predict(position, token, window=7), pool.gather(1, drawn).double())


def test_each_lifespan_up_to_a_long_follow_up_is_counted_as_itself() -> None:
    longest = 2**17
    null, lifespan = RandomNull(1, longest), torch.arange(1, longest + 1)
    null.update(log4_lifespan(lifespan[None], longest), lifespan, lifespan)
    assert null.counts[0].tolist() == [0] + [1] * longest


def test_windows_draw_at_random_each_its_own_in_any_order() -> None:
    null, (target, position, token) = RandomNull(GATES, LONGEST), window_of(0)
    null.update(target, position, token)
    first, second = (null.predict(position, token, window) for window in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(null.predict(position, token, 0), first)


def test_tokens_that_validation_does_not_ask_for_cost_the_table_nothing(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path, vocabulary=2**31 - 1)  # a row of the table for each id would not fit
    scores = score_nulls(LabelledKeys(shards))
    assert torch.equal(scores["token_table"].r2(), scores["constant"].r2())  # no id comes twice


def test_all_windows_pooled_score_as_window_by_window(tmp_path: Path) -> None:
    rows = LabelledKeys(write_tiny_shards(tmp_path))
    pooled, apart = score_nulls(rows, pooled=True), score_nulls(rows)
    for name in NULLS:
        assert [len(sums.count) for sums in (pooled[name], apart[name])] == [1, 3]
        torch.testing.assert_close(pooled[name].r2(), apart[name].r2(), atol=1e-12, rtol=0)


# -- moments ----------------------------------------------------------------------------------------------------------


def test_moments_widen_the_keys_of_one_gate_at_a_time() -> None:
    keys, target = torch.randn(50, ROWS, 8).half(), torch.randn(50, ROWS, 1)
    moments = Moments.zeros(50, 8)
    assert largest_made(lambda: moments.update(keys, target)) <= 8 * max(ROWS * 8, 50 * ROWS)
