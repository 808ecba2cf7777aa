"""Eviction methods against plain loops, and what each of them needs."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.baselines import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Method,
    Once,
    Random,
    Schedule,
    Simulation,
    SnapKV,
    Streaming,
    StreamingLLM,
)
from smartkv.baselines.state import LiveKeys
from smartkv.errors import SmartKVError
from smartkv.models.rotary import Rotation
from smartkv.models.softmax import Softmax
from tests.models import gpt2
from tests.smartkv.baselines import naive

NO_ROTATION = Rotation(gpt2())
NAIVE = {
    StreamingLLM: naive.recency,
    KeyNorm: naive.key_norm,
    KeyDiff: naive.keydiff,
    SnapKV: naive.snapkv,
    TOVA: naive.tova,
    H2O: naive.h2o,
    ExpectedAttention: naive.expected_attention,
}


def drawn(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(heads, tokens, 6, generator=generator) for heads in (4, 2, 2))
    return q, k, v


@pytest.mark.parametrize("method", NAIVE)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 12),
    window=st.integers(1, 6),
    sinks=st.integers(0, 4),
    room=st.integers(0, 10),
    own=st.one_of(st.none(), st.integers(4, 30)),
    once=st.booleans(),
)
def test_attention_under_a_method_is_that_of_plain_loops(
    method: type[Method],
    seed: int,
    tokens: int,
    chunk: int,
    window: int,
    sinks: int,
    room: int,
    own: int | None,
    once: bool,
) -> None:
    q, k, v = drawn(seed, tokens)
    schedule: Schedule = Streaming(window + sinks + room, window, sinks, chunk)
    if once:
        schedule = Once(max(1, tokens // 2), window + sinks + room, window, sinks)
        own = None  # a window that slides over what is left would leave nothing to see in plain loops
    simulation = Simulation(method(), schedule, NO_ROTATION)
    if own is not None and method in (TOVA, SnapKV):
        own = None  # they look with the latest queries at all that is left
    got = simulation.attend(0, q, k, v, Softmax(0.4), own)
    tiles = schedule.tiles(tokens)
    score = partial(naive.snapkv, queries=window) if method is SnapKV else NAIVE[method]
    want, seen = naive.simulate(q, k, v, 0.4, own, tiles, window, sinks, score)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert torch.equal(simulation.seen[0], seen)


class Watched(Method):
    """A method that records the positions that are left at each eviction."""

    def __init__(self, method: Method) -> None:
        self.method, self.needs = method, method.needs
        self.positions: list[Tensor] = []

    def score(self, live: LiveKeys, window: int) -> Tensor:
        self.positions.append(live.position.clone())
        return self.method.score(live, window)


@pytest.mark.parametrize("method", [*NAIVE, Random])
def test_what_a_method_needs_is_what_changes_its_choice(method: type[Method]) -> None:
    (q, k, v), (other, *_) = drawn(1, 60), drawn(2, 60)

    def left(queries: Tensor) -> list[Tensor]:
        watched = Watched(method())
        Simulation(watched, Streaming(16, 4, 2, 8), NO_ROTATION).attend(0, queries, k, v, Softmax(0.4), None)
        return watched.positions

    same = all(torch.equal(a, b) for a, b in zip(left(q), left(other), strict=True))
    assert same == (method.needs == "keys")


def choices_of_random(seed: int, tokens: int) -> list[Tensor]:
    watched = Watched(Random(seed))
    q, k, v = drawn(0, tokens)
    Simulation(watched, Streaming(16, 4, 2, 8), NO_ROTATION).attend(0, q, k, v, Softmax(0.4), None)
    return watched.positions


def test_random_choices_follow_from_the_seed_and_not_from_what_is_read_later() -> None:
    first = choices_of_random(0, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, choices_of_random(0, 88), strict=False))
    assert not all(torch.equal(a, b) for a, b in zip(first, choices_of_random(1, 64), strict=True))


def test_random_choices_are_a_fair_sample_of_what_was_read() -> None:
    watched = Watched(Random())
    q, k, v = (part[:1].expand(200, -1, -1) for part in drawn(0, 64))
    Simulation(watched, Streaming(20, 1, 0, 8), NO_ROTATION).attend(0, q, k, v, Softmax(0.4), None)
    old = (watched.positions[-1] < 32).float().sum(dim=1).mean()  # of 20 from 56 tokens; 8 more are new
    assert float(old) == pytest.approx(20 * 32 / 56, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SnapKV(queries=0), "queries must be 1 to 64"),
        (lambda: SnapKV(kernel=4), "the kernel odd"),
        (lambda: ExpectedAttention(future=0), "future must be at least 1"),
        (lambda: ExpectedAttention(epsilon=-1.0), "epsilon at least 0"),
    ],
)
def test_mistakes_are_told(make: object, message: str) -> None:
    with pytest.raises(SmartKVError, match=message):
        make()  # type: ignore[operator]
