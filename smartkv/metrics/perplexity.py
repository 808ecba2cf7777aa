"""Negative log-likelihood of text under a model, with a full cache or an evicting one."""

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
from smartkv.models.wrappers import input_device
from smartkv.policies.hybrid import HybridPolicy

LOGITS_AT_ONCE = 256  # tokens whose logits are in memory together, since vocabularies are large


class TokenLosses(NamedTuple):
    """Loss and rank of each scored token.

    Attributes:
        nll: Negative log-likelihood in nats, float32 `[tokens]`.
        rank: Number of tokens that the model finds more likely, int64 `[tokens]`; 0 if greedy decoding would choose
            this token.
    """

    nll: Tensor
    rank: Tensor


def query_before(token: int) -> int:
    """Return the index of the query that predicts a token, which is the token before it.

    Footprints count from the query that predicts the first scored token.

    Args:
        token: Index of the token in its text, at least 1.
    """
    return token - 1


@torch.inference_mode()
def token_losses(
    model: PreTrainedModel, tokens: Tensor, first_token: int = 1, cache: LifespanCache | None = None
) -> TokenLosses:
    """Compute the loss of each of `tokens[first_token:]`, given the tokens before it.

    Args:
        model: The model.
        tokens: Token ids of one window, `[tokens]`.
        first_token: Index of the first scored token, at least 1.
        cache: An unused cache attached to the model. None means a full cache.

    Raises:
        SmartKVError: There is no token to score.
    """
    if not 1 <= first_token < len(tokens):
        raise SmartKVError(
            f"a window of {len(tokens)} tokens has nothing to score from token {first_token} on: "
            f"choose a first token from 1 to {len(tokens) - 1}, or longer windows"
        )
    ids = tokens.long().to(input_device(model))
    # The last token is left out, because it predicts no scored token.
    output = model.base_model(input_ids=ids[None, :-1], past_key_values=cache, use_cache=cache is not None)
    return losses_after(model, output.last_hidden_state[0, query_before(first_token) :], ids[first_token:])


@torch.inference_mode()
def losses_after(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> TokenLosses:
    """Compute the loss of each token from the last hidden state before it.

    Args:
        model: The model, of which only the output embedding is used.
        hidden: `[tokens, hidden]`, in the model's dtype.
        targets: Token ids `[tokens]`.
    """
    head = model.get_output_embeddings()
    nll, rank = [], []
    for start in range(0, len(targets), LOGITS_AT_ONCE):
        block = slice(start, start + LOGITS_AT_ONCE)
        logits, target = head(hidden[block]).float(), targets[block]
        nll.append(F.cross_entropy(logits, target, reduction="none"))
        rank.append((logits > logits.gather(1, target[:, None])).sum(dim=-1))
    return TokenLosses(torch.cat(nll).cpu(), torch.cat(rank).cpu())


def window_nll(
    model: PreTrainedModel, tokens: Tensor, first_token: int = 1, cache: LifespanCache | None = None
) -> float:
    """Compute the mean NLL of `tokens[first_token:]`, in nats per token.

    Arguments and errors are those of `token_losses`.
    """
    return float(token_losses(model, tokens, first_token, cache).nll.double().mean())


@dataclass(frozen=True)
class EvictedWindow:
    """Loss, footprint and memory of one window under a policy.

    Attributes:
        nll: Mean NLL of the scored tokens, in nats.
        footprint: Footprint of each head over the queries that predict a scored token, float64 `[layers, kv_heads]`.
        peak_bytes: Largest storage in bytes, with the chunk being written.
        share: Footprint over all layers and heads. None: their mean, as in a model whose layers would hold equally many
            keys in a full cache.
        held: Keys held after the window ÷ those of a full cache. None: not measured.
    """

    nll: float
    footprint: Tensor
    peak_bytes: int
    share: float | None = None
    held: float | None = None

    @property
    def overall(self) -> float:
        """Footprint over all layers and heads."""
        return float(self.footprint.mean()) if self.share is None else self.share


def evicted_nll(
    model: PreTrainedModel,
    gates: GateBank | None,
    policy: HybridPolicy,
    tokens: Tensor,
    first_token: int = 1,
    chunk: int = 1024,
    budget: float | None = None,
) -> EvictedWindow:
    """Score one window with a new `LifespanCache`.

    Args:
        model: The model.
        gates: Its gates. None for a policy without gates.
        policy: The policy of the cache; with a budget its price is open.
        tokens: Token ids of the window, `[tokens]`.
        first_token: Index of the first scored token, at least 1.
        chunk: Tokens per chunk of the prefill.
        budget: Share of the keys of the whole window that a floating price holds. None: nothing in the policy is open.

    Raises:
        SmartKVError: There is no token to score, or gates and policy do not fit the model.
    """
    read = len(tokens) - 1
    first_query, plan = query_before(first_token), None if budget is None else read
    with LifespanCache(model, gates, policy, chunk, first_query, footprint=budget, plan=plan, rollback=0) as cache:
        nll = window_nll(model, tokens, first_token, cache)
        cache.settle()
    held = float(cache.live_keys.sum()) / Architecture.of(model.config).keys_of_full_cache(read)
    return EvictedWindow(nll, cache.footprint_by_head, cache.peak_bytes, cache.footprint, held)


def full_cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Compute the bytes of a full cache's keys and values for one sequence, in the dtype of `model`.

    Args:
        model: The model.
        tokens: Length of the sequence.

    Raises:
        SmartKVError: The model's family is not supported.
    """
    arch = Architecture.of(model.config)
    return 2 * arch.keys_of_full_cache(tokens) * arch.head_dim * model.dtype.itemsize
