"""Ranking metrics against plain loops."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smartkv.metrics.ranking import Reliability, concordance, top_share


def drawn(seed: int, gates: int, rows: int, levels: int) -> Tensor:
    return torch.randint(levels, (gates, rows), generator=torch.Generator().manual_seed(seed)).float()


def naive_share(score: list[float], future: list[float], share: float) -> float:
    """Mean over all orders of tied keys."""
    keys, shares = range(len(score)), []
    room = len(score) * share
    for order in itertools.permutations(keys):
        if any(score[a] < score[b] for a, b in itertools.pairwise(order)):
            continue
        whole, part = int(room), room - int(room)
        kept = sum(future[key] for key in order[:whole])
        shares.append((kept + part * future[order[whole]]) / sum(future))
    return sum(shares) / len(shares)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 6), levels=st.integers(1, 8), share=st.floats(0.05, 0.95))
def test_the_share_of_the_top_is_that_of_all_orders_of_ties(seed: int, rows: int, levels: int, share: float) -> None:
    score, future = drawn(seed, 2, rows, levels), drawn(seed + 1, 2, rows, 5) + 0.5
    each, _ = top_share(score, future, share)
    for gate in range(2):
        assert float(each[gate]) == pytest.approx(naive_share(score[gate].tolist(), future[gate].tolist(), share))


def test_all_gates_together_are_as_one_gate_with_all_keys() -> None:
    score, future = drawn(1, 3, 20, 50), drawn(2, 3, 20, 9)
    assert float(top_share(score, future, 0.25)[1]) == float(top_share(score.view(1, -1), future.view(1, -1), 0.25)[0])


def test_the_true_order_holds_most_and_equal_scores_hold_their_share() -> None:
    future = drawn(3, 4, 50, 1000)
    best = top_share(future, future, 0.1)[0]
    assert (top_share(drawn(4, 4, 50, 1000), future, 0.1)[0] < best).all()
    assert top_share(torch.zeros(4, 50), future, 0.1)[0].tolist() == pytest.approx([0.1] * 4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), levels=st.integers(1, 6))
def test_concordance_is_that_of_plain_loops(seed: int, rows: int, levels: int) -> None:
    score, lifespan = drawn(seed, 11, rows, levels), drawn(seed + 1, 11, rows, 4)
    shares = concordance(score, lifespan)
    for gate in range(11):
        right = pairs = 0.0
        for a, b in itertools.permutations(range(rows), 2):
            if lifespan[gate, a] > lifespan[gate, b]:
                pairs += 1
                ahead = float(score[gate, a] - score[gate, b])
                right += 1.0 if ahead > 0 else 0.5 if ahead == 0 else 0.0
        assert float(shares[gate]) == pytest.approx(right / pairs) if pairs else math.isnan(shares[gate])


def test_reliability_is_that_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(300, 2, generator=generator)
    outcome = (torch.rand(300, 2, generator=generator) < probability.square()).float()
    reliability = Reliability.zeros(2, 5)
    reliability.update(probability[:100].view(4, 25, 2), outcome[:100].view(4, 25, 2))
    reliability.update(probability[100:], outcome[100:])
    for age in range(2):
        error = 0.0
        for place in range(5):
            inside = [n for n in range(300) if min(4, int(float(probability[n, age]) * 5)) == place]
            assert float(reliability.count[age, place]) == len(inside)
            error += abs(sum(float(probability[n, age] - outcome[n, age]) for n in inside)) / 300
        assert float(reliability.error()[age]) == pytest.approx(error, abs=1e-6)


def test_the_error_of_true_probabilities_is_none() -> None:
    reliability = Reliability.zeros(1)
    reliability.update(torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([[0.0], [1.0], [1.0]]))
    assert float(reliability.error()) == 0
