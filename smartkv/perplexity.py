"""Negative log-likelihood of text under a model."""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError

LOGITS_AT_ONCE = 256  # tokens whose logits are held together: vocabularies are large


@torch.inference_mode()
def window_nll(model: PreTrainedModel, tokens: Tensor, first: int = 1) -> float:
    """Mean NLL of `tokens[first:]` given what stands before each, full cache, in nats a token.

    Args:
        tokens: ids of one window, `[tokens]`.
        first: index of the first token that is scored, at least 1.

    Raises:
        SmartKVError: no token is left to score.
    """
    length = len(tokens)
    if not 1 <= first < length:
        raise SmartKVError(f"a window of {length} tokens has nothing to score from token {first} on")
    ids = tokens.long().to(model.device)
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    total = 0.0
    for start in range(first - 1, length - 1, LOGITS_AT_ONCE):
        stop = min(start + LOGITS_AT_ONCE, length - 1)
        logits = head(hidden[start:stop]).float()
        total += float(F.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="sum"))
    return total / (length - first)
