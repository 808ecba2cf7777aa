"""Observed attention: pass a model's attention probabilities to an observer while the model runs.

The harvest of labels and `eval calibrate` read attention this way. `observe_attention` replaces a model's attention by
one that computes the probabilities for one tile of queries at a time, passes them to an observer and frees them.
Memory grows with tokens × queries of a tile, not with tokens².

The attention that works on an evicting cache is in `smartkv.cache.forward_pass`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.models.attention_interface import AttentionInputs, attention_switched_to, register_attention
from smartkv.models.key_hooks import hook_keys
from smartkv.models.softmax import Softmax
from smartkv.models.wrappers import attention_layer, input_device, language_model

OBSERVED = "smartkv_observed"
TILE_ELEMENTS = 2**22  # most probabilities of a tile, over all heads: 16 MiB in float32, which a CPU's caches hold
GPU_TILE_ELEMENTS = 2**28  # the same elsewhere: 1 GiB, because there each tile costs the start of a dozen kernels
_OBSERVER = "_smartkv_observer"


class AttentionObserver(Protocol):
    """Callbacks of `observe_attention`, called layer by layer for the one sequence of a forward pass.

    Within a layer the order is `on_keys`, `on_rotated_keys`, then `on_tile` for each tile of queries.
    """

    def on_keys(self, layer: int, keys: Tensor) -> None:
        """Receive the keys before the rotary embedding, `[kv_heads, tokens, head_dim]` in the model's dtype."""

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        """Receive the keys after the rotary embedding, same shape; without one they equal those of `on_keys`."""

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        """Receive the attention probabilities of one tile of queries.

        Args:
            layer: Index of the layer.
            first_query: Position of the tile's first query.
            probabilities: float32 `[kv_heads, group, queries, keys]`, with the keys up to the tile's last query. A key
                that causality or a sliding window hides has 0. Those of a query sum to 1, or with learned sinks to
                less. The tensor is valid during the call only.
        """


def tile_queries(query_heads: int, tokens: int, device: torch.device) -> int:
    """Return the queries of a tile: 16 to 128 on a CPU, and elsewhere as many as memory allows."""
    if device.type == "cpu":
        return max(16, min(128, TILE_ELEMENTS // (query_heads * tokens)))
    return max(128, min(tokens, GPU_TILE_ELEMENTS // (query_heads * tokens)))


def attention_tiles(
    query: Tensor, key: Tensor, softmax: Softmax, sliding_window: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Compute causal attention probabilities, one tile of queries at a time.

    A tile has as many queries as `tile_queries` says.

    Args:
        query: `[query_heads, tokens, head_dim]`.
        key: `[kv_heads, tokens, head_dim]`.
        softmax: The step from products of queries and keys to probabilities.
        sliding_window: Most keys that a query sees, itself included. None for all.

    Yields:
        The position of the tile's first query, and float32 probabilities `[kv_heads, group, queries, keys]` with the
        keys up to the tile's last query.
    """
    query_heads, tokens, _ = query.shape
    kv_heads = key.shape[0]
    grouped = query.unflatten(0, (kv_heads, query_heads // kv_heads))
    tile = tile_queries(query_heads, tokens, key.device)
    future = torch.full((tile, tile), float("-inf"), dtype=torch.float32, device=key.device).triu_(1)
    unread = key.new_empty(())  # baddbmm wants an addend; with beta=0 it does not read it
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        queries = grouped[:, :, start:stop].flatten(1, 2)  # [kv_heads, group · queries, head_dim]
        scores = torch.baddbmm(unread, queries, key[:, :stop].transpose(1, 2), beta=0, alpha=softmax.scaling)
        scores = softmax.capped(scores.float()).unflatten(1, (-1, stop - start))
        # Only the tile's own positions, the last columns, can lie in the future of one of its queries.
        scores[..., start:].add_(future[: stop - start, : stop - start])
        if sliding_window is not None and stop > sliding_window:
            index = torch.arange(start, stop, device=key.device)
            past = torch.arange(stop, device=key.device)
            scores.masked_fill_(past[None, :] <= index[:, None] - sliding_window, float("-inf"))
        yield start, softmax.probabilities(scores)


def _attend(inputs: AttentionInputs) -> Tensor:
    """Compute the attention of one layer over one sequence and report it to the observer on the module."""
    observer, finite = getattr(inputs.module, _OBSERVER)
    query, key, value = inputs.query[0], inputs.key[0], inputs.value[0]
    observer.on_rotated_keys(inputs.layer, key)
    output = torch.empty_like(query)
    for start, probabilities in attention_tiles(query, key, inputs.softmax, inputs.sliding_window):
        observer.on_tile(inputs.layer, start, probabilities)
        queries, keys = probabilities.shape[2:]
        mixed = torch.matmul(probabilities.to(value.dtype).flatten(1, 2), value[:, :keys])
        output[:, start : start + queries] = mixed.view(query.shape[0], queries, -1)
    # a NaN probability exceeds no threshold: its key would be labelled as never hit
    finite.add(f"layer {inputs.layer} gave attention that is NaN or infinite", output)
    return output[None]


register_attention(OBSERVED, _attend)


class FiniteChecks:
    """Notes whether tensors are finite, and tells it once at the end: on a GPU each answer must be waited for."""

    def __init__(self) -> None:
        self._noted: list[tuple[str, Tensor]] = []

    def add(self, fault: str, tensor: Tensor) -> None:
        """Note a tensor that is not empty. `fault` is what the error says if it is not finite."""
        self._noted.append((fault, torch.stack(tensor.aminmax())))  # a NaN makes both of them NaN

    def check(self) -> None:
        """Check all tensors that were noted since the last check.

        Raises:
            SmartKVError: One is NaN or infinite. The message has the first fault.
        """
        noted, self._noted = self._noted, []
        extremes = on_cpu([each.float() for _, each in noted]) if noted else torch.empty(0, 2)
        for (fault, _), finite in zip(noted, extremes.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                raise SmartKVError(f"{fault}: check the model's weights and dtype")


def on_cpu(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Stack tensors, which may lie on several devices, on the CPU; those of one device travel together."""
    if len({tensor.device for tensor in tensors}) == 1:
        return torch.stack(list(tensors), dim=dim).cpu()
    return torch.stack([tensor.cpu() for tensor in tensors], dim=dim)


@contextmanager
def observe_attention(model: PreTrainedModel, observer: AttentionObserver) -> Iterator[FiniteChecks]:
    """Context manager in which forward passes of `model` report to `observer`.

    Each forward pass takes one sequence without padding and without a cache. It is computed in the model's own dtype,
    whatever autocast and `torch.set_default_dtype` say. On exit the model is as before, also after an exception.

    Args:
        model: A model of a supported family, or a wrapper of one.
        observer: Receives keys and probabilities of every layer.

    Raises:
        ValueError: A forward pass has more than one sequence.
        SmartKVError: On exit: a layer's attention was NaN or infinite.

    Yields:
        Checks that are made on exit, to which others may be added.
    """
    finite = FiniteChecks()

    def on_keys(module: nn.Module, keys: Tensor) -> None:
        if keys.shape[0] != 1:
            raise ValueError(f"observe_attention takes one sequence a forward pass, got {keys.shape[0]}")
        observer.on_keys(attention_layer(module), keys[0])

    lm = language_model(model)
    with (
        hook_keys(lm, on_keys),
        attention_switched_to(lm, OBSERVED, _OBSERVER, (observer, finite)),
        in_own_dtype(input_device(lm)),
    ):
        yield finite
        finite.check()


@contextmanager
def in_own_dtype(device: torch.device) -> Iterator[None]:
    """Context manager without autocast, in which new tensors are float32 unless they say otherwise.

    Args:
        device: Device whose autocast is switched off.
    """
    before = torch.get_default_dtype()
    with torch.autocast(device.type, enabled=False):
        if before == torch.float32:  # the setting is global: other threads are left alone where nothing changes
            yield
            return
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
