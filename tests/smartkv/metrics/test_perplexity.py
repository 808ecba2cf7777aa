"""NLL of windows against the model's own loss."""

import pytest
import torch

from smartkv.errors import SmartKVError
from smartkv.metrics.perplexity import LOGITS_AT_ONCE, window_nll
from tests.models import FAMILIES, llama, token_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_nll_is_the_models_own_loss(family: str) -> None:
    model, tokens = FAMILIES[family](), token_ids(40)
    with torch.no_grad():
        expected = float(model(tokens[None], labels=tokens[None]).loss)
    assert window_nll(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_only_tokens_from_the_first_on_are_scored() -> None:
    model, tokens = llama(max_position_embeddings=600), token_ids(LOGITS_AT_ONCE + 50)
    with torch.no_grad():
        logs = model(tokens[None]).logits[0].log_softmax(dim=-1)
    expected = -sum(float(logs[i - 1, tokens[i]]) for i in range(20, len(tokens))) / (len(tokens) - 20)
    assert window_nll(model, tokens, first_token=20) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("first", [0, 10, 11])
def test_nothing_to_score_is_refused(first: int) -> None:
    with pytest.raises(SmartKVError, match=f"10 tokens has nothing to score from token {first}"):
        window_nll(llama(), token_ids(10), first)
