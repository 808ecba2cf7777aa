"""Labels: for how long, and how strongly, later queries look at a key.

Definitions:

* query `i ≥ j` *hits* key `j` of a KV head when the largest attention probability over the query heads of that head's
  group exceeds the threshold;
* *lifespan* of `j` = `i_last − j + 1` tokens, 1 if nobody hits it later;
* *horizon* of `j` = `L − 1 − j`, the later queries that the window still held;
* *future attention* of `j` at age `a` = mean of the group's largest probability over the queries of ages `[a, a + H)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.io.checks import all_finite
from smartkv.models.architecture import Architecture
from smartkv.models.observation import observe_attention


@dataclass(frozen=True)
class LabelSpec:
    """What is measured about each key.

    Attributes:
        thresholds: attention probabilities above which a query hits a key, each in (0, 1).
        ages: future attention is measured from these ages on, in tokens, each ≥ 1. May be empty.
        follow_up: `H`, tokens; the span of future attention, and of what a gate is trained on.
    """

    thresholds: tuple[float, ...] = (0.05,)
    ages: tuple[int, ...] = ()
    follow_up: int = 1024

    def __post_init__(self) -> None:
        if not self.thresholds or not all(0 < t < 1 for t in self.thresholds):
            raise SmartKVError(
                f"thresholds must be attention probabilities between 0 and 1, got {list(self.thresholds)}"
            )
        if not all(a >= 1 for a in self.ages):
            raise SmartKVError(f"ages must be at least 1 token, got {list(self.ages)}")
        if self.follow_up < 1:
            raise SmartKVError(f"follow_up must be at least 1 token, got {self.follow_up}")


class LayerLabels:
    """The labels of one layer, built from blocks of attention in the order of the queries."""

    def __init__(self, spec: LabelSpec, kv_heads: int, tokens: int, device: torch.device) -> None:
        self.spec = spec
        self.lifespan = torch.ones(len(spec.thresholds), kv_heads, tokens, dtype=torch.int32, device=device)
        self.attention_sum = torch.zeros(len(spec.ages), kv_heads, tokens, device=device)

    def update(self, first_query: int, probabilities: Tensor) -> None:
        """`probabilities`: `[kv_heads, group, queries, keys]`, as `attention_tiles` yields them."""
        strongest = probabilities.amax(dim=1)  # [kv_heads, queries, keys]
        self._update_lifespans(first_query, strongest)
        for row, age in zip(self.attention_sum, self.spec.ages, strict=True):
            self._update_attention(row, age, first_query, strongest)

    def _update_lifespans(self, first_query: int, strongest: Tensor) -> None:
        # few keys are hit in a block: find these by one maximum, and look for the last hit among them only
        head, key = (strongest.amax(dim=1) > min(self.spec.thresholds)).nonzero(as_tuple=True)
        columns = strongest[head, :, key]  # [hit keys, queries]
        place = torch.arange(1, columns.shape[1] + 1, dtype=torch.int32, device=columns.device)
        for lifespan, threshold in zip(self.lifespan, self.spec.thresholds, strict=True):
            last = ((columns > threshold) * place).amax(dim=1)  # 1-based in the block, 0: no hit
            hit = last > 0
            lifespan[head[hit], key[hit]] = (first_query + last[hit] - key[hit]).int()

    def _update_attention(self, total: Tensor, age: int, first_query: int, strongest: Tensor) -> None:
        """Add this block's queries to the sums of the keys that see them at ages `[age, age + H)`."""
        follow_up = self.spec.follow_up
        queries, keys = strongest.shape[1:]
        end = first_query + queries
        reach = (max(0, first_query - age - follow_up + 1), max(0, min(keys, end - age)))  # some query counts
        whole = (max(0, end - age - follow_up), max(0, min(keys, first_query - age + 1)))  # every query counts
        if whole[0] >= whole[1]:
            edges = [reach]
        else:
            total[:, slice(*whole)] += strongest[:, :, slice(*whole)].sum(dim=1)
            edges = [(reach[0], whole[0]), (whole[1], reach[1])]
        query = torch.arange(first_query, end, device=strongest.device)[:, None]
        for low, high in edges:
            if low < high:
                ages = query - torch.arange(low, high, device=strongest.device)[None, :]
                counted = (ages >= age) & (ages < age + follow_up)
                total[:, low:high] += (strongest[:, :, low:high] * counted).sum(dim=1)

    def future_attention(self) -> Tensor:
        """float32 `[ages, kv_heads, tokens]`; NaN where the window ended before all `H` queries were seen."""
        tokens = self.attention_sum.shape[-1]
        mean = self.attention_sum / self.spec.follow_up
        for row, age in zip(mean, self.spec.ages, strict=True):
            row[:, max(0, tokens - age - self.spec.follow_up + 1) :] = float("nan")
        return mean


@dataclass
class WindowLabels:
    """One window's keys and labels, on the CPU.

    Attributes:
        keys: pre-RoPE, float16 `[layers, kv_heads, tokens, head_dim]`.
        keys_post_rope: after the rotary embedding, same shape; None unless asked for.
        lifespan: int32 `[thresholds, layers, kv_heads, tokens]`, tokens, as seen in the window (not capped).
        horizon: int32 `[tokens]`.
        future_attention: float32 `[ages, layers, kv_heads, tokens]`; None without ages.
    """

    keys: Tensor
    keys_post_rope: Tensor | None
    lifespan: Tensor
    horizon: Tensor
    future_attention: Tensor | None


class _WindowObserver:
    """Collects keys and labels, layer by layer."""

    def __init__(self, spec: LabelSpec, post_rope: bool) -> None:
        self.spec, self.post_rope = spec, post_rope
        self.keys: list[Tensor] = []
        self.rotated: list[Tensor] = []
        self.labels: list[LayerLabels] = []

    def on_keys(self, layer: int, keys: Tensor) -> None:
        self.keys.append(_to_half(keys, layer))
        self.labels.append(LayerLabels(self.spec, keys.shape[0], keys.shape[1], keys.device))

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        if self.post_rope:
            self.rotated.append(_to_half(keys, layer))

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        self.labels[layer].update(first_query, probabilities)


def _to_half(keys: Tensor, layer: int) -> Tensor:
    half = keys.to("cpu", torch.float16)
    if not all_finite(half):
        raise SmartKVError(
            f"layer {layer} gave keys that are NaN, infinite or beyond float16: check the model's weights and dtype"
        )
    return half


@torch.inference_mode()
def label_window(
    model: PreTrainedModel, tokens: Sequence[int] | Tensor, spec: LabelSpec, post_rope: bool = False
) -> WindowLabels:
    """Run one window through a frozen LM and take keys and labels out of its own attention step.

    Args:
        model: a causal LM in evaluation mode; its head is not run.
        tokens: ids, `[tokens]`.
        spec: thresholds, ages and follow-up.
        post_rope: also return the keys after the rotary embedding.

    Raises:
        SmartKVError: keys that are not finite, or a window longer than the model's positions.
    """
    ids = torch.as_tensor(tokens, dtype=torch.long, device=model.device)[None]
    check_window(model, ids.shape[1])
    observer = _WindowObserver(spec, post_rope)
    with observe_attention(model, observer):
        model.base_model(input_ids=ids, use_cache=False)
    length = ids.shape[1]
    return WindowLabels(
        keys=torch.stack(observer.keys),
        keys_post_rope=torch.stack(observer.rotated) if post_rope else None,
        lifespan=torch.stack([labels.lifespan for labels in observer.labels], dim=1).cpu(),
        horizon=torch.arange(length - 1, -1, -1, dtype=torch.int32),
        future_attention=torch.stack([labels.future_attention() for labels in observer.labels], dim=1).cpu()
        if spec.ages
        else None,
    )


def check_window(model: PreTrainedModel, window: int) -> None:
    """Refuse a window that the model has no positions for, and a model whose keys we do not know.

    Raises:
        SmartKVError: naming both lengths, or the model's family.
    """
    limit = Architecture.of(model.config).max_positions
    if window < 1:
        raise SmartKVError("a window needs at least one token, got none")
    if window > limit:
        raise SmartKVError(f"window of {window} tokens is longer than the model's {limit} positions: make it shorter")


def log4_lifespan(lifespan: Tensor, follow_up: int) -> Tensor:
    """The target `y = log4(min(lifespan, H))`, float32: 0 for 1 token, 2 for 16, 5 for 1,024."""
    return lifespan.clamp(max=follow_up).float().log2() / 2
