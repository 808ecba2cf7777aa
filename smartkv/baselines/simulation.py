"""Simulation of an eviction method in one forward pass of a model over one text."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.baselines.methods import Method
from smartkv.baselines.schedules import Schedule
from smartkv.baselines.state import LiveKeys
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.attention_interface import AttentionInputs, attention_switched_to, register_attention
from smartkv.models.rotary import Rotation
from smartkv.models.softmax import Softmax

COMPRESSED = "smartkv_compressed"
_SIMULATION = "_smartkv_simulation"


class Simulation:
    """State on the attention modules of a model under an eviction method, and its counts afterwards.

    Args:
        method: Method that scores keys.
        schedule: When keys are evicted and how many stay.
        rotation: Rotary embedding of the model.

    Attributes:
        seen: Number of keys that each query saw, by layer, int64 `[kv_heads, tokens]`.
        live: Keys that are left at the end of the text, by layer.
    """

    def __init__(self, method: Method, schedule: Schedule, rotation: Rotation) -> None:
        self.method, self.schedule, self.rotation = method, schedule, rotation
        self.seen: dict[int, Tensor] = {}
        self.live: dict[int, LiveKeys] = {}

    def footprint_by_head(self, first_query: int = 0) -> Tensor:
        """Compute the footprint of each head over the queries from `first_query` on.

        It is the number of keys that these queries saw, over the number that they would see in a full cache.

        Returns:
            float64 `[layers, kv_heads]`.

        Raises:
            SmartKVError: No text was read, or `first_query` is not in it.
        """
        if not self.seen or not 0 <= first_query < (tokens := self.seen[0].shape[1]):
            raise SmartKVError(f"the text that was read has no query {first_query}: read a longer text first")
        full = (torch.arange(first_query, tokens) + 1).sum()
        seen = torch.stack([self.seen[layer][:, first_query:].sum(dim=1) for layer in sorted(self.seen)])
        return seen.double().cpu() / full

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, sliding_window: int | None
    ) -> Tensor:
        """Compute the attention of one layer while keys are evicted.

        Args:
            layer: Index of the layer.
            query: `[query_heads, tokens, head_dim]`, after the rotary embedding.
            key: `[kv_heads, tokens, head_dim]`, after the rotary embedding.
            value: `[kv_heads, tokens, head_dim]`.
            softmax: The step from products of queries and keys to probabilities.
            sliding_window: Window of the model itself, in tokens. None if it has none.

        Returns:
            A tensor like `query`.
        """
        output, seen_per_tile = torch.empty_like(query), []
        live = LiveKeys(layer, key.shape[0], softmax, self.rotation.of_layer(layer), self.method.needs)
        for start, stop, budget in self.schedule.tiles(query.shape[1]):
            queries = query[:, start:stop].unflatten(0, (key.shape[0], -1))
            live.add(queries, key[:, start:stop], value[:, start:stop])
            mixed, seen = live.attend(queries, start, sliding_window)
            output[:, start:stop] = mixed.flatten(0, 1)
            seen_per_tile.append(seen)
            if budget is not None and budget < live.count:
                pinned = (live.position < self.schedule.sinks) | (live.position >= stop - self.schedule.window)
                score = self.method.score(live, self.schedule.window).masked_fill(pinned, float("inf"))
                live.keep(score.sort(dim=1, descending=True, stable=True).indices[:, :budget])
        self.seen[layer], self.live[layer] = torch.cat(seen_per_tile, dim=1), live
        return output


def _attend(inputs: AttentionInputs) -> Tensor:
    """Compute the attention of one layer under the simulation on its module."""
    simulation: Simulation = getattr(inputs.module, _SIMULATION)
    query, key = inputs.query, inputs.key
    if len(query) != 1 or query.shape[2] != key.shape[2]:
        raise SmartKVError(
            f"a method is simulated on one text without a cache, got {len(query)} rows of {query.shape[2]} queries and "
            f"{key.shape[2]} keys: pass one row and no past_key_values"
        )
    value, softmax = inputs.value[0], inputs.softmax
    return simulation.attend(inputs.layer, query[0], key[0], value, softmax, inputs.sliding_window)[None]


register_attention(COMPRESSED, _attend)


@contextmanager
def simulated_eviction(model: PreTrainedModel, method: Method, schedule: Schedule) -> Iterator[Simulation]:
    """Run forward passes of `model` under an eviction method inside this context.

    Each pass reads one text without padding, cache and gradients. On exit the model is restored, also after an
    exception.

    Args:
        model: The model.
        method: Method that scores keys.
        schedule: When keys are evicted and how many stay.

    Yields:
        The simulation, from which the footprint can be read after a pass.

    Raises:
        SmartKVError: The model's family is not supported, or a pass has several rows or a cache.
    """
    Architecture.of(model.config)
    simulation = Simulation(method, schedule, Rotation(model))
    with attention_switched_to(model, COMPRESSED, _SIMULATION, simulation), torch.inference_mode():
        yield simulation
