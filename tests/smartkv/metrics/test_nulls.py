"""Sums over keys, what predicts without reading keys, and R² by head."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import R2Score

from smartkv.errors import SmartKVError
from smartkv.gates.standardization import Moments
from smartkv.labels.lifespans import log4_lifespan
from smartkv.metrics.bootstrap import bootstrap
from smartkv.metrics.nulls import NULLS, RandomNull, TableNull, make_nulls, score_nulls
from smartkv.metrics.r2 import RegressionSums
from smartkv.shards.labelled_keys import LabelledKeys
from smartkv.shards.manifest import Manifest
from tests.models import write_tiny_shards

quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 10**6)
splits = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def shards(tmp_path: Path) -> Manifest:
    """Two train shards (2 windows and 1) and one of validation (3)."""
    return write_tiny_shards(tmp_path / "shards", post_rope=True)


# -- moments ----------------------------------------------------------------------------------------------------------


@quick
@given(seed=seeds, sizes=splits, offset=st.sampled_from([0, 300, -40]), half=st.booleans())
def test_moments_are_torchs_mean_and_std_however_the_rows_come(
    seed: int, sizes: list[int], offset: float, half: bool
) -> None:
    keys = offset + random(seed, 3, 1 + sum(sizes), 5)
    keys = keys.half() if half else keys
    target = random(seed + 1, 3, keys.shape[1])
    moments, start = Moments.zeros(3, 5), 0
    for size in [*sizes, 1]:
        moments.update(keys[:, start : start + size], target[:, start : start + size, None])
        start += size
    mean, std, mean_target = moments.result()
    torch.testing.assert_close(mean, keys.double().mean(dim=1).float())
    torch.testing.assert_close(std, keys.double().std(dim=1, correction=0).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mean_target[:, 0], target.double().mean(dim=1).float())


@pytest.mark.parametrize("value", [0.0, 1.0, 300.1, 60000.0])
def test_a_dimension_that_never_varies_gets_std_1(value: float) -> None:
    keys = random(0, 2, 1000, 3)
    keys[1, :, 2] = value
    moments = Moments.zeros(2, 3)
    for part in keys.split(7, dim=1):
        moments.update(part, part[..., :1])
    mean, std, _ = moments.result()
    assert std[1, 2] == 1
    assert mean[1, 2].item() == pytest.approx(value)
    assert (std.flatten()[:5] != 1).all()


def test_moments_are_summed_over_processes_by_their_tensors() -> None:
    keys, target = random(0, 2, 30, 3), random(1, 2, 30)
    whole, first, second = (Moments.zeros(2, 3) for _ in range(3))
    whole.update(keys, target[..., None])
    first.update(keys[:, :10], target[:, :10, None])
    second.update(keys[:, 10:], target[:, 10:, None])
    for ours, other in zip(first.tensors(), second.tensors(), strict=True):
        ours += other  # in place, as a reduction does
    for ours, expected in zip(first.result(), whole.result(), strict=True):
        torch.testing.assert_close(ours, expected)


# -- nulls ------------------------------------------------------------------------------------------------------------


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


# -- R² ---------------------------------------------------------------------------------------------------------------


def sums_of(predictions: list[Tensor], targets: list[Tensor]) -> RegressionSums:
    sums = RegressionSums.zeros(len(targets), targets[0].shape[0])
    for window, (prediction, target) in enumerate(zip(predictions, targets, strict=True)):
        sums.update(window, prediction, target)
    return sums


def example(seed: int, windows: int = 6, gates: int = 3, rows: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Predictions and targets, `[gates, rows]` a window."""
    target = 2.5 + random(seed, windows, gates, rows)
    return list(target + 0.5 * random(seed + 1, windows, gates, rows)), list(target)


@quick
@given(seed=seeds, windows=st.integers(1, 6), rows=st.integers(2, 12))
def test_r2_by_head_is_that_of_torchmetrics(seed: int, windows: int, rows: int) -> None:
    predictions, targets = example(seed, windows, 3, rows)
    metric = R2Score(multioutput="raw_values").set_dtype(torch.float64)
    for prediction, target in zip(predictions, targets, strict=True):
        metric.update(prediction.T.double(), target.T.double())
    torch.testing.assert_close(sums_of(predictions, targets).r2(), metric.compute(), atol=1e-9, rtol=1e-9)


def test_a_window_updated_in_parts_scores_as_in_one() -> None:
    (prediction,), (target,) = example(0, windows=1)
    sums = RegressionSums.zeros(1, 3)
    for part in (slice(0, 4), slice(4, None)):
        sums.update(0, prediction[:, part], target[:, part])
    torch.testing.assert_close(sums.r2(), sums_of([prediction], [target]).r2())


@pytest.mark.parametrize("value", [0.0, 2.5, 5.0])
def test_r2_of_a_target_that_never_varies_is_nan_for_that_head_alone(value: float) -> None:
    predictions, targets = example(0)
    for target in targets:
        target[1] = value
    assert sums_of(predictions, targets).r2().isnan().tolist() == [False, True, False]


def test_a_window_that_counts_twice_weighs_as_if_it_came_twice() -> None:
    predictions, targets = example(0)
    weight = torch.tensor([2, 0, 1, 0, 3, 1])
    drawn = [window for window, times in enumerate(weight.tolist()) for _ in range(times)]
    repeated = sums_of([predictions[window] for window in drawn], [targets[window] for window in drawn])
    torch.testing.assert_close(sums_of(predictions, targets).r2(weight), repeated.r2())


@quick
@given(seed=seeds)
def test_the_interval_holds_the_point_estimate(seed: int) -> None:
    sums = sums_of(*example(seed, windows=20))
    low, high = sums.interval(draws=300)
    assert low < sums.r2().nanmean() < high


def test_the_interval_is_the_same_every_time_and_another_for_another_seed() -> None:
    sums = sums_of(*example(0))
    assert sums.interval() == sums.interval()
    assert sums.interval(seed=0) != sums.interval(seed=1)


def test_a_wider_level_gives_a_wider_interval() -> None:
    sums = sums_of(*example(0))
    narrow, wide = sums.interval(level=0.5), sums.interval(level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_each_draw_counts_as_many_windows_as_there_are() -> None:
    seen = []

    def statistic(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight[:, 0]

    bootstrap(7, statistic, draws=50)
    assert seen[0].shape == (50, 7)
    assert (seen[0].sum(dim=1) == 7).all()
    assert len(seen[0].unique(dim=0)) > 40


def test_one_window_gives_an_interval_of_no_width() -> None:
    sums = sums_of(*example(0, windows=1))
    low, high = sums.interval(draws=10)
    assert low == high == pytest.approx(sums.r2().mean().item())


def test_groups_are_drawn_whole() -> None:
    seen = []

    def statistic(weight: Tensor) -> Tensor:
        seen.append(weight)
        return weight[:, 0]

    bootstrap(6, statistic, draws=50, groups=[9, 4, 4, 9, 9, 7])
    weight = seen[0]
    assert torch.equal(weight[:, [0, 0]], weight[:, [3, 4]]) and torch.equal(weight[:, 1], weight[:, 2])
    assert (weight[:, [0, 1, 5]].sum(dim=1) == 3).all() and len(weight.unique(dim=0)) > 5
