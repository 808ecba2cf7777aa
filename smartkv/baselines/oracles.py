"""Oracle labels: lifespans and attention read from a whole window, a bound for methods and gates."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, LayerLabels, check_window
from smartkv.models.observation import observe_attention
from smartkv.models.wrappers import input_device


class OracleLabels(NamedTuple):
    """Labels of each key of a window.

    Attributes:
        lifespan: Lifespan in tokens, int32 `[layers, kv_heads, tokens]`; see `smartkv.labels.lifespans`.
        attention: Mean of the query group's largest attention probability over the window's queries from an age on,
            float32 `[layers, kv_heads, tokens]`; 0 for a key without such queries.
    """

    lifespan: Tensor
    attention: Tensor


class _Observer:
    """Labels of each layer, filled while the model attends."""

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
    """Label the keys of a window by the attention that they get under a full cache.

    Args:
        model: The model.
        tokens: Token ids of the window, `[tokens]`.
        age: Age in tokens from which on attention counts, at least 1.
        threshold: Attention probability above which a query hits a key.

    Raises:
        SmartKVError: The age is below 1, the threshold outside (0, 1), or the window longer than the model's positions.
    """
    check_window(model, len(tokens))
    if age < 1:
        raise SmartKVError(f"age must be at least 1 token, got {age}")
    observer = _Observer(LabelSpec((threshold,), (age,), len(tokens)))
    with observe_attention(model, observer):
        model.base_model(input_ids=tokens.long().to(input_device(model))[None], use_cache=False)
    queries = (len(tokens) - age - torch.arange(len(tokens))).clamp(min=1)  # of each key, from that age on
    lifespan = torch.stack([labels.lifespan[0].cpu() for labels in observer.labels])
    attention = torch.stack([labels.attention_sum[0].cpu() for labels in observer.labels])
    return OracleLabels(lifespan, attention / queries)
