"""Negative log-likelihood of text under a model, with a full cache or with one that evicts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture
from smartkv.policies.hybrid import HybridPolicy

LOGITS_AT_ONCE = 256  # tokens whose logits are held together: vocabularies are large


class TokenLosses(NamedTuple):
    """Of each scored token.

    Attributes:
        nll: float32 `[tokens]`, nats.
        rank: int64 `[tokens]`, how many tokens the model thinks likelier; 0: greedy decoding would have said it.
    """

    nll: Tensor
    rank: Tensor


def query_before(token: int) -> int:
    """The query that predicts a token: the one before it. Footprints count from that of the first scored token.

    Args:
        token: index of the token in its text, at least 1.
    """
    return token - 1


@torch.inference_mode()
def token_losses(
    model: PreTrainedModel, tokens: Tensor, first_token: int = 1, cache: LifespanCache | None = None
) -> TokenLosses:
    """What the model thinks of each of `tokens[first_token:]` given what stands before it.

    Args:
        tokens: ids of one window, `[tokens]`.
        first_token: index of the first token that is scored, at least 1.
        cache: an unused cache, attached; None: a full cache.

    Raises:
        SmartKVError: no token is left to score.
    """
    if not 1 <= first_token < len(tokens):
        raise SmartKVError(f"a window of {len(tokens)} tokens has nothing to score from token {first_token} on")
    ids = tokens.long().to(model.device)
    # the last token predicts nothing: neither it nor its key is needed
    output = model.base_model(input_ids=ids[None, :-1], past_key_values=cache, use_cache=cache is not None)
    return losses_after(model, output.last_hidden_state[0, query_before(first_token) :], ids[first_token:])


@torch.inference_mode()
def losses_after(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> TokenLosses:
    """What the model thinks of each token, from the last hidden state before it.

    Args:
        hidden: `[tokens, hidden]`, the model's dtype.
        targets: ids `[tokens]`.
    """
    head = model.get_output_embeddings()
    nll, rank = [], []
    for start in range(0, len(targets), LOGITS_AT_ONCE):
        here = slice(start, start + LOGITS_AT_ONCE)
        logits, target = head(hidden[here]).float(), targets[here]
        nll.append(F.cross_entropy(logits, target, reduction="none"))
        rank.append((logits > logits.gather(1, target[:, None])).sum(dim=-1))
    return TokenLosses(torch.cat(nll).cpu(), torch.cat(rank).cpu())


def window_nll(
    model: PreTrainedModel, tokens: Tensor, first_token: int = 1, cache: LifespanCache | None = None
) -> float:
    """Mean NLL of `tokens[first_token:]`, in nats a token; arguments and errors as `token_losses`."""
    return float(token_losses(model, tokens, first_token, cache).nll.double().mean())


@dataclass(frozen=True)
class EvictedWindow:
    """One window under a policy.

    Attributes:
        nll: mean over the scored tokens, nats.
        footprint: float64 `[layers, kv_heads]`, over the queries whose next token is scored.
        peak_bytes: largest storage, the chunk at work included.
    """

    nll: float
    footprint: Tensor
    peak_bytes: int


def evicted_nll(
    model: PreTrainedModel,
    gates: GateBank | None,
    policy: HybridPolicy,
    tokens: Tensor,
    first_token: int = 1,
    chunk: int = 1024,
) -> EvictedWindow:
    """`window_nll` with a fresh LifespanCache, and what the cache held.

    Raises:
        SmartKVError: as `window_nll` and `LifespanCache`.
    """
    with LifespanCache(model, gates, policy, chunk, first_query=query_before(first_token)) as cache:
        nll = window_nll(model, tokens, first_token, cache)
    return EvictedWindow(nll, cache.footprint_by_head, cache.peak_bytes)


def full_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the keys and values of one sequence of `tokens` under a full cache, in the dtype of `model`.

    Raises:
        SmartKVError: a family that is not supported.
    """
    arch = Architecture.of(model.config)
    return 2 * arch.gates * tokens * arch.head_dim * model.dtype.itemsize
