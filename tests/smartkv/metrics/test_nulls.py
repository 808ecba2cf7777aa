"""Nulls against plain tables and pools of labels, and their memory."""

import pickle
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import log4_lifespan
from smartkv.metrics.nulls import NULLS, RandomNull, TableNull, make_nulls, score_nulls
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest
from tests.allocations import largest_allocation
from tests.models import write_tiny_shards
from tests.smartkv.metrics.fixtures import random

GATES, ROWS, LONGEST = 6, 40, 64
quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10**6)


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Two train shards (2 windows and 1) and one of validation (3)."""
    return write_tiny_shards(tmp_path / "shards", post_rope=True)


def window_of(seed: int, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Target `[GATES, ROWS]`, position and token of a random window in which short lifespans are frequent."""
    generator = torch.Generator().manual_seed(seed)
    lifespan = torch.rand(GATES, ROWS, generator=generator).pow(4).mul(LONGEST).int() + 1
    token = torch.randint(tokens, (ROWS,), generator=generator).int()
    return log4_lifespan(lifespan, LONGEST), torch.arange(ROWS, dtype=torch.int32), token


def naive_table(target: Tensor, bins: list[int], asked: list[int]) -> list[list[float]]:
    """Means of `target` `[gates, rows]` per head and bin by a dict; the head's mean where a bin was never seen."""
    answer = []
    for head in target.tolist():
        seen = defaultdict(list)
        for value, place in zip(head, bins, strict=True):
            seen[place].append(value)
        overall = sum(head) / len(head)
        answer.append([sum(seen[place]) / len(seen[place]) if place in seen else overall for place in asked])
    return answer


@quick
@given(seed=seeds, tokens=st.lists(st.integers(0, 6), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_the_token_table_answers_the_mean_of_a_token_or_of_the_head(seed: int, tokens: list[int], cut: int) -> None:
    target, token = random(seed, 2, len(tokens)), torch.tensor(tokens, dtype=torch.int32)
    null = TableNull(2, 9, "token_table")
    for part in (slice(0, cut), slice(cut, None)):
        null.update(target[:, part], torch.zeros_like(token[part]), token[part])
    asked = torch.arange(9, dtype=torch.int32)  # 7 and 8 were never seen
    answer = null.predict(torch.zeros_like(asked), asked)
    torch.testing.assert_close(answer.float(), torch.tensor(naive_table(target, tokens, asked.tolist())))


@pytest.mark.parametrize("window", [16, 32, 33, 100])
def test_the_position_null_answers_the_mean_of_a_32nd_of_the_window(window: int) -> None:
    width = -(-window // 32)
    position = torch.arange(window, dtype=torch.int32).repeat(2)
    target = random(window, 2, 2 * window)
    null = make_nulls(2, window, tokens=3, longest=4)["position"]
    null.update(target, position, torch.zeros_like(position))
    bins = [place // width for place in position.tolist()]
    answer = null.predict(position, torch.zeros_like(position))
    torch.testing.assert_close(answer.float(), torch.tensor(naive_table(target, bins, bins)))


def test_the_random_null_draws_from_each_heads_own_labels_the_same_every_time() -> None:
    target = log4_lifespan(torch.tensor([[1, 2, 3, 4], [10, 20, 30, 40]]), 40)
    rows = torch.zeros(200, dtype=torch.int32)
    answers = []
    for _ in range(2):
        null = RandomNull(2, longest=40, seed=5)
        null.update(target[:, :2], rows[:2], rows[:2])
        null.update(target[:, 2:], rows[:2], rows[:2])
        answers.append(null.predict(rows, rows))
    assert [set(head.tolist()) for head in answers[0]] == [set(head.tolist()) for head in target]
    assert torch.equal(answers[0], answers[1])


def whole_split(shards: Manifest, split: str) -> tuple[Tensor, list[int], list[int], list[int]]:
    """Target `[gates, rows]` at threshold 0.05, positions, tokens and windows of the labelled rows, read naively."""
    targets, positions, tokens, windows = [], [], [], []
    for entry in shards.of_split(split):
        whole = load_file(shards.folder / entry.file)
        rows = [t for t in range(entry.tokens) if 2 <= t % 16 < 12]  # window 16, sinks 2, follow-up 4
        targets.append(log4_lifespan(whole["lifespan"][0][..., rows].flatten(0, 1), 4))
        positions += whole["position"][rows].tolist()
        tokens += whole["token"][rows].tolist()
        windows += [(entry.file, row // 16) for row in rows]
    return torch.cat(targets, dim=1), positions, tokens, [sorted(set(windows)).index(w) for w in windows]


@pytest.mark.parametrize("name", ["constant", "position", "token_table"])
def test_scored_nulls_are_those_of_a_naive_table(name: str, shards: Manifest) -> None:
    target, position, token, _ = whole_split(shards, "train")
    truth, asked_position, asked_token, _ = whole_split(shards, "validation")
    bins, asked = {
        "constant": ([0] * len(token), [0] * len(asked_token)),
        "position": (position, asked_position),  # 16 places in 32 bins
        "token_table": (token, asked_token),
    }[name]
    prediction = torch.tensor(naive_table(target, bins, asked)).double()
    wide = truth.double()
    residual = (wide - prediction).square().sum(dim=1)
    expected = 1 - residual / (wide - wide.mean(dim=1, keepdim=True)).square().sum(dim=1)
    torch.testing.assert_close(score_nulls(LabelledKeys(shards))[name].r2(), expected, atol=1e-6, rtol=0)


def test_every_null_is_scored_on_each_validation_window(shards: Manifest) -> None:
    scores = score_nulls(LabelledKeys(shards, layers="1"))
    truth, _, _, window = whole_split(shards, "validation")
    assert sorted(scores) == sorted(NULLS)
    for sums in scores.values():
        assert sums.count.tolist() == [10, 10, 10]
        for number in range(3):
            rows = [row for row, place in enumerate(window) if place == number]
            torch.testing.assert_close(sums.target[number], truth[2:, rows].double().sum(dim=1))


def test_the_random_null_scores_below_the_constant(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path, splits=[("train", 8), ("validation", 8)])
    scores = score_nulls(LabelledKeys(shards))
    assert (scores["random"].r2() < scores["constant"].r2()).all()


def test_scoring_without_validation_windows_says_so(tmp_path: Path) -> None:
    shards = write_tiny_shards(tmp_path, splits=[("train", 2)])
    with pytest.raises(SmartKVError, match="no validation windows"):
        score_nulls(LabelledKeys(shards))


# -- what a null holds ----------------------------------------------------------------------------------------------


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
    for total, other_total in zip(one.tensors(), other.tensors(), strict=True):
        total += other_total
    asked = window_of(9)[1:]
    torch.testing.assert_close(one.predict(*asked), both.predict(*asked))


def test_neither_learning_nor_predicting_copies_the_token_table() -> None:
    null = TableNull(GATES, 10_000, "token_table")
    target, position, token = window_of(0)
    assert largest_allocation(lambda: null.update(target, position, token)) <= 8 * GATES * ROWS
    assert largest_allocation(lambda: null.predict(position, token)) <= 8 * GATES * ROWS


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
