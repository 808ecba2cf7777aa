"""The draw from a buffer that windows flow through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.replay import Replay
from smartkv.errors import SmartKVError
from smartkv.shards.manifest import RowBlock


def windows(count: int, blocks: int) -> list[list[RowBlock]]:
    return [[RowBlock(f"train-{w}", 0, 8 * b, 8 * b + 8) for b in range(blocks)] for w in range(count)]


sizes = st.integers(1, 9)


@given(count=sizes, blocks=sizes, buffer=sizes, passes=st.integers(1, 4), per_step=sizes, seed=st.integers(0, 99))
def test_each_block_is_drawn_that_often_while_it_is_held_and_the_buffer_never_overflows(
    count: int, blocks: int, buffer: int, passes: int, per_step: int, seed: int
) -> None:
    replay = Replay(windows(count, blocks), buffer, passes, per_step, (seed, 0))
    held: set[RowBlock] = set()
    drawn: dict[RowBlock, int] = {}
    read = []
    steps = list(replay)
    for step in steps:
        read += step.read
        held |= {block for number in step.read for block in replay.windows[number]}
        assert len(held) <= buffer * blocks + len(step.done)
        assert set(step.draw) <= held and step.draw
        for block in step.draw:
            drawn[block] = drawn.get(block, 0) + 1
        assert set(step.done) == {block for block in step.draw if drawn[block] == passes}
        held -= set(step.done)
    assert read == list(range(count)) and not held and not replay.live
    assert drawn == {block: passes for window in replay.windows for block in window}
    assert len(steps) == len(replay) and all(len(step.draw) == per_step for step in steps[:-1])


def test_a_seed_decides_the_order() -> None:
    orders = [[tuple(step.draw) for step in Replay(windows(5, 6), 2, 2, 4, (seed, 0))] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_batches_mix_the_windows_that_are_held() -> None:
    """A batch of a buffer of eight windows that held one window's rows alone would be no shuffle."""
    steps = list(Replay(windows(8, 16), 8, 1, 16, (0, 0)))
    assert all(len({block.file for block in step.draw}) >= 4 for step in steps)


@pytest.mark.parametrize("wrong", [{"buffer": 0}, {"passes": 0}, {"blocks_per_step": 0}, {"windows": []}])
def test_a_draw_of_nothing_is_refused(wrong: dict[str, object]) -> None:
    settings = {"windows": windows(1, 1), "buffer": 1, "passes": 1, "blocks_per_step": 1, "seed": (0,)} | wrong
    with pytest.raises(SmartKVError, match=r"at least 1|no windows"):
        Replay(**settings)  # type: ignore[arg-type]
