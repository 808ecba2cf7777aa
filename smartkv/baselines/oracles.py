"""What only a reader of the whole window knows of a key: the bound that rules and gates are measured against."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, LayerLabels, check_window
from smartkv.models.observation import observe_attention


class OracleLabels(NamedTuple):
    """Of each key of a window.

    Attributes:
        lifespan: int32 `[layers, kv_heads, tokens]`, tokens; see `smartkv.labels.lifespans`.
        attention: float32, same shape: mean over the window's queries from an age on of the group's largest attention
            probability; 0 where there are none.
    """

    lifespan: Tensor
    attention: Tensor


class _Observer:
    def __init__(self, spec: LabelSpec) -> None:
        self.spec, self.labels = spec, list[LayerLabels]()

    def on_keys(self, layer: int, keys: Tensor) -> None:
        self.labels.append(LayerLabels(self.spec, keys.shape[0], keys.shape[1], keys.device))

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        pass

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        self.labels[layer].update(first_query, probabilities)


@torch.inference_mode()
def oracle_labels(model: PreTrainedModel, tokens: Tensor, age: int, threshold: float = 0.05) -> OracleLabels:
    """Read a window with a full cache, and say of each key how it will be looked at.

    Args:
        tokens: ids `[tokens]`.
        age: attention counts from this age on, in tokens; at least 1.
        threshold: attention probability above which a query hits a key.

    Raises:
        SmartKVError: an age below 1, a threshold outside (0, 1), or a window that is longer than the model's positions.
    """
    check_window(model, len(tokens))
    if age < 1:
        raise SmartKVError(f"age must be at least 1 token, got {age}")
    observer = _Observer(LabelSpec((threshold,), (age,), len(tokens)))
    with observe_attention(model, observer):
        model.base_model(input_ids=tokens.long().to(model.device)[None], use_cache=False)
    later = (len(tokens) - age - torch.arange(len(tokens))).clamp(min=1)
    lifespan = torch.stack([labels.lifespan[0].cpu() for labels in observer.labels])
    attention = torch.stack([labels.attention_sum[0].cpu() for labels in observer.labels])
    return OracleLabels(lifespan, attention / later)
