"""A model's attention under a method that drops keys, in one forward pass over one text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.baselines.methods import Method
from smartkv.baselines.schedules import Schedule
from smartkv.baselines.state import LiveKeys
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.attention_interface import attention_switched_to, default_scaling, register_attention
from smartkv.models.rotary import Rotation

COMPRESSED = "smartkv_compressed"
_SIMULATION = "_smartkv_simulation"


class Simulation:
    """What the attention modules find while a model reads under a method, and what is left of it to be told.

    Attributes:
        seen: of each layer, keys that each query saw, int64 `[kv_heads, tokens]`.
    """

    def __init__(self, method: Method, schedule: Schedule, rotation: Rotation) -> None:
        self.method, self.schedule, self.rotation = method, schedule, rotation
        self.seen: dict[int, Tensor] = {}

    def footprint_by_head(self, first_query: int = 0) -> Tensor:
        """Σ keys that queries from `first_query` on saw ÷ Σ keys of a full cache, float64 `[layers, kv_heads]`.

        Raises:
            SmartKVError: nothing was read, or no query counts.
        """
        if not self.seen or not 0 <= first_query < (tokens := self.seen[0].shape[1]):
            raise SmartKVError("nothing was read from which a footprint could be told: read longer text")
        full = (torch.arange(first_query, tokens) + 1).sum()
        seen = torch.stack([self.seen[layer][:, first_query:].sum(dim=1) for layer in sorted(self.seen)])
        return seen.double().cpu() / full

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, own: int | None) -> Tensor:
        """`query` `[query_heads, tokens, head_dim]`, `key`, `value` `[kv_heads, tokens, head_dim]` -> like `query`.
        `own`: the model's sliding window."""
        output, counted = torch.empty_like(query), []
        live = LiveKeys(layer, key.shape[0], scaling, self.rotation, self.method.needs)
        for start, stop, budget in self.schedule.blocks(query.shape[1]):
            queries = query[:, start:stop].unflatten(0, (key.shape[0], -1))
            live.add(queries, key[:, start:stop], value[:, start:stop])
            mixed, seen = live.attend(queries, start, own)
            output[:, start:stop] = mixed.flatten(0, 1)
            counted.append(seen)
            if budget is not None and budget < live.count:
                pinned = (live.position < self.schedule.sinks) | (live.position >= stop - self.schedule.window)
                score = self.method.score(live, self.schedule.window).masked_fill(pinned, float("inf"))
                live.keep(score.sort(dim=1, descending=True, stable=True).indices[:, :budget])
        self.seen[layer] = torch.cat(counted, dim=1)
        return output


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # in this place: kvpress, once imported, gives it by position
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function."""
    simulation: Simulation = getattr(module, _SIMULATION)
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        raise SmartKVError(f"a method is simulated on one text without a cache, got {len(query)} rows")
    scaling = default_scaling(module, query.shape[-1]) if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = simulation.attend(layer, query[0], key[0], value[0], scaling, sliding_window)
    return output.transpose(0, 1)[None].contiguous(), None


register_attention(COMPRESSED, _attention)


@contextmanager
def simulated_eviction(model: PreTrainedModel, method: Method, schedule: Schedule) -> Iterator[Simulation]:
    """Inside, forward passes of `model` over one text (no padding, no cache, no gradients) attend as under a method.

    The model is as it was on leaving, also after an exception.
    """
    Architecture.of(model.config)
    simulation = Simulation(method, schedule, Rotation(model))
    with attention_switched_to(model, COMPRESSED, _SIMULATION, simulation), torch.inference_mode():
        yield simulation
