"""Division of the plan into shards: every window once, one split a shard, and the tensors that need no model."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules.shard_plan import WindowRuns, shard_runs
from smartkv.shards.manifest import SPLITS
from smartkv.texts.windows import WindowPlan


@st.composite
def plans(draw: st.DrawFn) -> WindowPlan:
    counts = draw(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any))
    split = torch.tensor([s for s, count in enumerate(counts) for _ in range(count)], dtype=torch.int32)
    tokens = torch.arange(len(split), dtype=torch.int32)[:, None].expand(-1, 2)
    return WindowPlan(tokens, tokens, split, [], [])


@given(plan=plans(), windows_per_shard=st.integers(1, 5))
def test_shards_hold_every_window_exactly_once(plan: WindowPlan, windows_per_shard: int) -> None:
    held = [w for run in shard_runs(plan, windows_per_shard) for w in range(run.first, run.first + run.windows)]
    assert sorted(held) == list(range(len(plan.split)))


@given(plan=plans(), windows_per_shard=st.integers(1, 5))
def test_no_shard_mixes_splits(plan: WindowPlan, windows_per_shard: int) -> None:
    for run in shard_runs(plan, windows_per_shard):
        assert set(plan.split[run.first : run.first + run.windows].tolist()) == {SPLITS.index(run.split)}


@given(plan=plans(), windows_per_shard=st.integers(1, 5))
def test_shards_hold_no_more_windows_than_asked_for_and_have_names_of_their_own(
    plan: WindowPlan, windows_per_shard: int
) -> None:
    runs = shard_runs(plan, windows_per_shard)
    assert all(1 <= run.windows <= windows_per_shard for run in runs)
    assert len({run.file for run in runs}) == len(runs)


@pytest.fixture
def plan() -> WindowPlan:
    """Three windows of four tokens: two of train, one of validation."""
    tokens = torch.arange(12, dtype=torch.int32).view(3, 4)
    return WindowPlan(tokens, tokens // 2, torch.tensor([0, 0, 1], dtype=torch.int32), [], [])


def test_an_item_has_the_tokens_and_documents_of_its_windows(plan: WindowPlan) -> None:
    runs = WindowRuns(plan, shard_runs(plan, 2))
    assert [run.tokens.tolist() for run in runs] == [plan.tokens[:2].tolist(), plan.tokens[2:].tolist()]
    assert [run.document.tolist() for run in runs] == [plan.document[:2].tolist(), plan.document[2:].tolist()]


def test_a_shard_s_tensors_have_a_row_a_token(plan: WindowPlan) -> None:
    first, last = (run.tensors() for run in WindowRuns(plan, shard_runs(plan, 2)))
    assert first["position"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert first["token"].tolist() == list(range(8))
    assert first["document"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert first["split"].tolist() == [0] * 8 and last["split"].tolist() == [1] * 4
