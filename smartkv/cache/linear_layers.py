"""Layers with linear attention in a cache: they hold states of a fixed size and no keys.

A hybrid model has them beside its layers with attention. Their states stay in transformers' own cache layers. A state
that went on cannot go back.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from smartkv.models.wrappers import LINEAR_ATTENTION

STATES = ("conv_states", "recurrent_states")  # attributes of transformers' cache layer, each a dict by number


def layers_of_model(config: Any, storage: list[Any]) -> list[Any]:
    """Return a cache layer for each layer of a model, in order.

    Args:
        config: of the model.
        storage: cache layers, one for each layer with attention.
    """
    kinds = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    if LINEAR_ATTENTION not in kinds:
        return list(storage)
    own, with_attention = DynamicCache(config=config).layers, iter(storage)
    return [own[n] if kind == LINEAR_ATTENTION else next(with_attention) for n, kind in enumerate(kinds)]


def linear_layers(layers: list[Any]) -> dict[int, Any]:
    """Return those of a cache's layers that hold states, by their place in the model."""
    return {number: layer for number, layer in enumerate(layers) if not isinstance(layer, CacheLayerMixin)}


def forget_states(layers: list[Any]) -> None:
    """Put new layers in place of those that hold states; transformers would keep tensors for as many rows only."""
    for number, layer in linear_layers(layers).items():
        layers[number] = type(layer)(number_of_states=layer.number_of_states)


def select_states(layers: list[Any], rows: Tensor) -> None:
    """Keep these rows of the batch in all states, int64 `[rows]`, which may repeat."""
    with torch.inference_mode(False), torch.no_grad():  # transformers changes the states in place, in any mode
        for layer in linear_layers(layers).values():
            layer.reorder_cache(rows)


def states_of(layer: Any) -> dict[str, Tensor]:
    """Return the states of a layer, by names for `restore_states`."""
    named = {f"{kind}.{number}": state for kind in STATES for number, state in getattr(layer, kind).items()}
    return {name: state for name, state in named.items() if state is not None}


def restore_states(layer: Any, states: dict[str, Tensor]) -> None:
    """Give a new layer the states of another one, as `states_of` returned them.

    Raises:
        KeyError, ValueError: a name that `states_of` does not give.
    """
    for name, state in states.items():
        kind, _, number = name.partition(".")
        update = {"conv_states": layer.update_conv_state, "recurrent_states": layer.update_recurrent_state}[kind]
        with torch.inference_mode(False), torch.no_grad():  # transformers changes the states in place, in any mode
            update(state.clone(), int(number))
