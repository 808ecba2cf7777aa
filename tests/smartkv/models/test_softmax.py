"""Scores and probabilities against plain loops, with a cap and with learned sinks."""

import math

import pytest
import torch

from smartkv.models.softmax import Softmax

CAP, LEARNED = 0.8, torch.tensor([0.5, -1.0, 2.0, 0.0])


def kinds() -> list[Softmax]:
    return [Softmax(0.3), Softmax(0.3, CAP), Softmax(0.3, None, LEARNED), Softmax(0.3, CAP, LEARNED)]


@pytest.mark.parametrize("softmax", kinds())
def test_attention_is_that_of_plain_loops(softmax: Softmax) -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(*shape, generator=random) for shape in ((3, 2, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 4))
    )
    mask = torch.rand(3, 2, 5, 7, generator=random) < 0.6
    mask[..., 0] = True
    output = softmax.attend(query, key, value, mask)
    scores = softmax.scores(query @ key[:, :, None].mT).masked_fill(~mask[:, :, None], -math.inf)
    found = softmax.probabilities(scores)
    for row, head, member, place in [(0, 0, 0, 0), (1, 1, 0, 3), (2, 0, 1, 4), (2, 1, 1, 2)]:
        weights = []
        for one in range(7):
            score = float(query[row, head, member, place] @ key[row, head, one]) * 0.3
            score = score if softmax.cap is None else CAP * math.tanh(score / CAP)
            weights.append(math.exp(score) if mask[row, head, place, one] else 0.0)
        nothing = 0.0 if softmax.learned_sinks is None else math.exp(float(LEARNED[2 * head + member]))
        want = torch.tensor(weights) / (sum(weights) + nothing)
        torch.testing.assert_close(found[row, head, member, place], want, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(output[row, head, member, place], want @ value[row, head], atol=1e-6, rtol=1e-4)
        log_total = float(softmax.log_total(scores)[row, head, member, place])
        assert log_total == pytest.approx(math.log(sum(weights) + nothing), abs=1e-5)


def test_only_scaling_is_plain() -> None:
    assert [softmax.plain for softmax in kinds()] == [True, False, False, False]


def test_pairs_take_the_learned_sinks_of_their_head() -> None:
    pairs = Softmax(0.3, None, LEARNED).of_pairs(
        torch.tensor([3, 0, 2]), 2
    )  # row 1, head 1; row 0, head 0; row 1, head 0
    assert pairs.learned_sinks is not None and pairs.learned_sinks.tolist() == [2.0, 0.0, 0.5, -1.0, 0.5, -1.0]
    assert Softmax(0.3).of_pairs(torch.tensor([1]), 2) == Softmax(0.3)


def test_dropout_takes_probabilities_and_scales_the_rest() -> None:
    query, key, value = torch.zeros(1, 1, 1, 1, 4), torch.zeros(1, 1, 4000, 4), torch.ones(1, 1, 4000, 4)
    mask = torch.ones(1, 1, 1, 4000, dtype=torch.bool)
    torch.manual_seed(0)
    dropped, whole = (Softmax(1.0, CAP).attend(query, key, value, mask, share) for share in (0.5, 0.0))
    torch.testing.assert_close(whole, torch.ones(1, 1, 1, 1, 4), atol=1e-4, rtol=0)
    assert 1e-3 < float((dropped - 1).abs().max()) < 0.1
