"""Lifespans and future attention: for how long, and how strongly, later queries attend to a key.

Definitions, in a window of `L` tokens with a follow-up of `H` tokens:

* Query `i ≥ j` *hits* key `j` of a KV head when the largest attention probability over the query heads of that head's
  group exceeds the threshold.
* The *lifespan* of `j` is `i_last − j + 1` tokens, with `i_last` the last query that hits it; 1 without a later hit.
* The *horizon* of `j` is `L − 1 − j`, the number of later queries in the window.
* The *future attention* of `j` at age `a` is the mean of the group's largest probability over the queries `i` with
  `a ≤ i − j < a + H`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.io.checks import describe
from smartkv.models.architecture import Architecture, check_model
from smartkv.models.observation import FiniteChecks, in_own_dtype, observe_attention, on_cpu
from smartkv.models.wrappers import input_device, language_model


@dataclass(frozen=True)
class LabelSpec:
    """Settings of the labels that are measured for each key.

    Attributes:
        thresholds: Attention probabilities above which a query hits a key, each in (0, 1).
        ages: Ages from which future attention is measured, in tokens, each at least 1. May be empty.
        follow_up: `H` in tokens: the span of future attention, and the cap on lifespans in training.

    Raises:
        SmartKVError: A value is out of its range.
    """

    thresholds: tuple[float, ...] = (0.05,)
    ages: tuple[int, ...] = ()
    follow_up: int = 1024

    def __post_init__(self) -> None:
        for name, example in (("thresholds", 0.05), ("ages", 16)):
            if not isinstance(value := getattr(self, name), tuple | list):
                example = value if isinstance(value, int | float) else example
                raise SmartKVError(f"{name} must be a tuple, got {describe(value)}: write {name}=({example},)")
        if not self.thresholds or not all(_is_real(t) and 0 < t < 1 for t in self.thresholds):
            raise SmartKVError(
                f"thresholds must be attention probabilities between 0 and 1, got {list(self.thresholds)}"
            )
        if not all(type(a) is int and a >= 1 for a in self.ages):
            raise SmartKVError(f"ages must be whole numbers of at least 1 token, got {list(self.ages)}")
        if type(self.follow_up) is not int or self.follow_up < 1:
            raise SmartKVError(f"follow_up must be a whole number of at least 1 token, got {describe(self.follow_up)}")


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class LayerLabels:
    """Labels of one layer, updated with one query tile of attention after the other.

    Attributes:
        lifespan: Lifespans in tokens so far, int32 `[thresholds, kv_heads, tokens]`, not capped.
        attention_sum: Sums of future attention so far, float32 `[ages, kv_heads, tokens]`.
    """

    def __init__(self, spec: LabelSpec, kv_heads: int, tokens: int, device: torch.device) -> None:
        self.spec = spec
        self.lifespan = torch.ones(len(spec.thresholds), kv_heads, tokens, dtype=torch.int32, device=device)
        # float32, whatever torch.set_default_dtype says
        self.attention_sum = torch.zeros(len(spec.ages), kv_heads, tokens, dtype=torch.float32, device=device)

    def update(self, first_query: int, probabilities: Tensor) -> None:
        """Add the next tile of queries.

        Args:
            first_query: Position of the tile's first query.
            probabilities: `[kv_heads, group, queries, keys]`, as `attention_tiles` yields them.
        """
        strongest = probabilities.amax(dim=1)  # [kv_heads, queries, keys]
        self._update_lifespans(first_query, strongest)
        for row, age in zip(self.attention_sum, self.spec.ages, strict=True):
            self._update_attention(row, age, first_query, strongest)

    def _update_lifespans(self, first_query: int, strongest: Tensor) -> None:
        update = self._search_columns if _columns_pay(strongest.device) else self._search_all
        update(first_query, strongest)

    def _search_all(self, first_query: int, strongest: Tensor) -> None:
        """Find the last hit of every key."""
        queries, keys = strongest.shape[1:]
        place = torch.arange(1, queries + 1, dtype=torch.int32, device=strongest.device)[:, None]
        before = first_query - torch.arange(keys, dtype=torch.int32, device=strongest.device)
        for lifespan, threshold in zip(self.lifespan[..., :keys], self.spec.thresholds, strict=True):
            last = ((strongest > threshold) * place).amax(dim=1)  # 1-based in the tile, 0 without a hit
            lifespan.copy_(torch.where(last > 0, before + last, lifespan))

    def _search_columns(self, first_query: int, strongest: Tensor) -> None:
        # Few keys are hit in a tile. One maximum finds them, and only their columns are searched for the last hit.
        head, key = (strongest.amax(dim=1) > min(self.spec.thresholds)).nonzero(as_tuple=True)
        columns = strongest[head, :, key]  # [hit keys, queries]
        place = torch.arange(1, columns.shape[1] + 1, dtype=torch.int32, device=columns.device)
        for lifespan, threshold in zip(self.lifespan, self.spec.thresholds, strict=True):
            last = ((columns > threshold) * place).amax(dim=1)  # 1-based in the tile, 0 without a hit
            hit = last > 0
            lifespan[head[hit], key[hit]] = (first_query + last[hit] - key[hit]).int()

    def _update_attention(self, total: Tensor, age: int, first_query: int, strongest: Tensor) -> None:
        """Add the tile to the sum of each key, counting the queries at ages `[age, age + H)` of that key."""
        follow_up = self.spec.follow_up
        queries, keys = strongest.shape[1:]
        end = first_query + queries
        # Ranges of keys [start, stop): those for which some query of the tile counts, and for which every query does.
        reach = (max(0, first_query - age - follow_up + 1), max(0, min(keys, end - age)))
        whole = (max(0, end - age - follow_up), max(0, min(keys, first_query - age + 1)))
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
        """Return the future attention, float32 `[ages, kv_heads, tokens]`.

        It is NaN for a key whose `H` queries are not all in the window.
        """
        tokens = self.attention_sum.shape[-1]
        mean = self.attention_sum / self.spec.follow_up
        for row, age in zip(mean, self.spec.ages, strict=True):
            row[:, max(0, tokens - age - self.spec.follow_up + 1) :] = float("nan")
        return mean


@dataclass
class WindowLabels:
    """Keys and labels of one window, on the CPU.

    Attributes:
        keys: Pre-RoPE keys, float16 `[layers, kv_heads, tokens, head_dim]`.
        keys_post_rope: Keys after the rotary embedding, same dtype and shape. None unless asked for.
        lifespan: Lifespans in tokens as seen in the window, not capped: int32 `[thresholds, layers, kv_heads, tokens]`.
        horizon: Number of later queries in the window, int32 `[tokens]`.
        future_attention: float32 `[ages, layers, kv_heads, tokens]`. None without ages.
    """

    keys: Tensor
    keys_post_rope: Tensor | None
    lifespan: Tensor
    horizon: Tensor
    future_attention: Tensor | None


class _WindowObserver:
    """Attention observer that collects keys and labels, layer by layer. `finite` checks the keys."""

    finite: FiniteChecks

    def __init__(self, spec: LabelSpec, post_rope: bool) -> None:
        self.spec, self.post_rope = spec, post_rope
        self.keys: list[Tensor] = []
        self.rotated: list[Tensor] = []
        self.labels: list[LayerLabels] = []

    def on_keys(self, layer: int, keys: Tensor) -> None:
        self.keys.append(self._half(keys, layer))
        self.labels.append(LayerLabels(self.spec, keys.shape[0], keys.shape[1], keys.device))

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        if self.post_rope:
            self.rotated.append(self._half(keys, layer))

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        self.labels[layer].update(first_query, probabilities)

    def _half(self, keys: Tensor, layer: int) -> Tensor:
        half = keys.to(torch.float16, copy=True)
        self.finite.add(f"layer {layer} gave keys that are NaN, infinite or beyond float16", half)
        return half

    def labelled(self, length: int) -> WindowLabels:
        future = [labels.future_attention() for labels in self.labels] if self.spec.ages else None
        return WindowLabels(
            keys=on_cpu(self.keys),
            keys_post_rope=on_cpu(self.rotated) if self.post_rope else None,
            lifespan=on_cpu([labels.lifespan for labels in self.labels], dim=1),
            horizon=torch.arange(length - 1, -1, -1, dtype=torch.int32),
            future_attention=None if future is None else on_cpu(future, dim=1),
        )


def _columns_pay(device: torch.device) -> bool:
    """Return whether it pays to look for hits in few columns: not on a GPU, which must be waited for to know them."""
    return device.type == "cpu"


@torch.inference_mode()
def label_window(
    model: PreTrainedModel, tokens: Sequence[int] | Tensor, spec: LabelSpec, post_rope: bool = False
) -> WindowLabels:
    """Run one window through a frozen LM and label its keys by the model's own attention.

    Neither autocast nor `torch.set_default_dtype` changes the result.

    Args:
        model: A causal LM in evaluation mode, or a wrapper of one. Its head is not run.
        tokens: Token ids `[tokens]`, integers.
        spec: Thresholds, ages and follow-up.
        post_rope: Also return the keys after the rotary embedding.

    Raises:
        SmartKVError: An argument of a wrong type or shape, ids that the model lacks, keys or attention that are not
            finite, or a window that is longer than the model's positions.
    """
    check_model(model)
    if not isinstance(spec, LabelSpec):
        raise SmartKVError(f"spec must be a LabelSpec, got {describe(spec)}: for example LabelSpec()")
    lm = language_model(model)
    embeddings: Any = lm.get_input_embeddings()
    ids = _token_ids(tokens, embeddings.num_embeddings).to(input_device(lm))[None]
    check_window(lm, ids.shape[1])
    observer = _WindowObserver(spec, post_rope)
    with in_own_dtype(input_device(lm)):
        with observe_attention(lm, observer) as observer.finite:
            lm.base_model(input_ids=ids, use_cache=False)
        return observer.labelled(ids.shape[1])


def _token_ids(tokens: Any, vocabulary: int) -> Tensor:
    """Return token ids as int64 `[tokens]`.

    Raises:
        SmartKVError: They are no integers `[tokens]`, or not in the vocabulary.
    """
    if isinstance(tokens, str | bytes | Mapping):
        advice = 'tokenizer(text)["input_ids"]' if isinstance(tokens, str | bytes) else 'its ["input_ids"]'
        raise SmartKVError(f"tokens must be token ids [tokens], got a {type(tokens).__name__}: give {advice}")
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SmartKVError(f"tokens must be token ids [tokens], got {describe(tokens)}: {error}") from error
    if ids.dim() != 1 or (ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool)):
        advice = ": one window at a time, give tokens[0]" if ids.dim() == 2 else ""
        raise SmartKVError(f"tokens must be token ids [tokens], got {ids.dtype} {list(ids.shape)}{advice}")
    ids = ids.long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise SmartKVError(
            f"tokens must be ids from 0 to {vocabulary - 1} of this model, got {int(ids.min())} to {int(ids.max())}: "
            "encode the text with the model's own tokenizer"
        )
    return ids


def check_window(model: PreTrainedModel, window: int) -> None:
    """Raise an error if a model cannot be labelled in windows of this length.

    Args:
        model: The model.
        window: Length of a window, in tokens.

    Raises:
        SmartKVError: The window is empty or longer than the model's positions, or the family is not supported.
    """
    limit = Architecture.of(model.config).max_positions
    if window < 1:
        raise SmartKVError(f"a window must have at least 1 token, got {window}")
    if window > limit:
        raise SmartKVError(f"window of {window} tokens is longer than the model's {limit} positions: make it shorter")


def log4_lifespan(lifespan: Tensor, follow_up: int) -> Tensor:
    """Return the training target `log4(min(lifespan, H))`, float32: 0 for 1 token, 2 for 16, 5 for 1,024.

    Args:
        lifespan: Lifespans in tokens, integers of any shape.
        follow_up: `H`, in tokens.
    """
    return lifespan.clamp(max=follow_up).float().log2() / 2
