"""Published eviction rules with a real cache: a prompt is read with all keys, then a share of its keys stays for good.

This is how these rules were published and how NVIDIA's kvpress runs them: once, after the prefill. Later keys all stay.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from eval.contenders.base import Reading
from eval.contenders.baselines import METHODS, SINKS
from smartkv.baselines import Method, Once, Random, Schedule, simulated_eviction
from smartkv.errors import FootprintOutOfReach, SmartKVError
from smartkv.metrics.perplexity import token_losses
from smartkv.models.backbone import Backbone
from smartkv.models.wrappers import input_device

RANDOM_PINNED = "random_pinned"  # random keys of the text; instruction and question always stay
RANDOM = "random"
COMPRESSING = (RANDOM, RANDOM_PINNED, *METHODS)
WINDOW = 32  # latest tokens of the prompt that always stay, as SnapKV has it; the same for every rule


class KeptLayer(DynamicLayer):
    """One layer's keys of a text of which some are gone, the same number in every head. Later keys all stay.

    Args:
        key, value: those that are left, `[1, kv_heads, keys, head_dim]`, keys after the rotary embedding.
        gone: number of keys that are gone.
    """

    def __init__(self, key: Tensor, value: Tensor, gone: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = key.dtype, key.device, True
        self.keys, self.values, self.gone = key, value, gone

    def get_seq_length(self, *_: Any) -> int:
        """Return the number of tokens that were read, those that are gone included."""
        return 0 if self.keys is None else int(self.keys.shape[-2]) + self.gone

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Return the number of keys after a call, and the position from which on a mask counts them.

        All old keys come before the new queries, so it does not matter to a causal mask which of them are gone.
        """
        tokens, _ = super().get_mask_sizes(*args, **kwargs)
        return tokens - self.gone, self.gone


class CompressedCache(Cache):
    """A cache that holds a share of a text's keys, to which all later keys are added.

    Args:
        layers: one for each layer of the model.
        seen: keys that the counted queries of the text saw, mean over KV heads.
        read: tokens of the text.
        first_query: queries from this one on count for the footprint.
    """

    layers: list[Any]

    def __init__(self, layers: Sequence[KeptLayer], seen: float, read: int, first_query: int) -> None:
        super().__init__(layers=list(layers))
        self.seen, self.read, self.first_query = seen, read, first_query

    @property
    def footprint(self) -> float:
        """Keys that the counted queries saw ÷ those that they would see in a full cache."""
        total, gone = self.get_seq_length(), self.layers[0].gone
        later = torch.arange(max(self.read, self.first_query), total) + 1 - gone
        full = torch.arange(self.first_query, total) + 1
        return (self.seen + int(later.sum())) / int(full.sum())

    @property
    def stored(self) -> float:
        """Keys that are held ÷ those of a full cache."""
        total = self.get_seq_length()
        return (total - self.layers[0].gone) / total


@dataclass
class CompressingRule:
    """A rule that compresses a prompt once, to the same number of keys in every head.

    Attributes:
        lm: the model.
        name: its name in results.
        method: scores keys.
        tokens: tokens of a text for which a footprint must be in reach.
        kind: see `Contender`.
        at_once: see `Decoding`.
    """

    lm: Backbone
    name: str
    method: Method
    tokens: int
    kind: str = "rule"
    at_once: int | None = None

    @property
    def needs(self) -> str:
        """Input at inference; see `Contender`."""
        return "nothing" if isinstance(self.method, Random) else self.method.needs

    @property
    def pins(self) -> bool:
        """Whether instruction and question always stay."""
        return self.name == RANDOM_PINNED

    def solved(self, footprint: float) -> Any:
        """Return the share of the prompt's keys that stay; see `Contender.solved`."""
        if round(footprint * self.tokens) < SINKS + WINDOW:
            raise FootprintOutOfReach(
                f"{footprint:.3g} of {self.tokens} tokens has no room for {SINKS} sinks and a window of {WINDOW}"
            )
        return {"share": footprint, "window": WINDOW, "protocol": "once"}

    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text whose first tokens are compressed once; see `Contender.read`."""
        prefill = first_token if prefill is None else prefill
        with simulated_eviction(self.lm.model, self.method, self._schedule(setting, prefill, None)) as simulation:
            losses = token_losses(self.lm.model, tokens, first_token)
        return Reading(*losses, float(simulation.footprint_by_head(first_query).mean()), None)

    @torch.inference_mode()
    def compress(
        self, setting: Any, tokens: Sequence[int], first_query: int, text: tuple[int, int] | None
    ) -> CompressedCache:
        """Read a prompt with all keys, and keep a share of them.

        A prompt that is so short that its sinks and its window are more than the share keeps these.

        Args:
            setting: a result of `solved`.
            tokens: ids of the prompt, or of its part that is compressed.
            first_query: queries from this one on count for the footprint.
            text: first of the tokens that may go, and last + 1: those before are the instruction, those after the
                question; None: not known.

        Raises:
            SmartKVError: `text` must be known and is not, or a model whose layers have windows of their own.
        """
        if any(self.lm.architecture.sliding_windows):
            raise SmartKVError(
                f"contender '{self.name}' decodes with models whose layers see everything, and this one's layers have "
                "sliding windows: leave it out"
            )
        schedule = self._schedule(setting, len(tokens), text)
        ids = torch.tensor([list(tokens)], device=input_device(self.lm.model))
        with simulated_eviction(self.lm.model, self.method, schedule) as simulation:
            self.lm.model.base_model(input_ids=ids, use_cache=False)
        counted = [simulation.seen[layer][:, first_query:].sum(dim=1) for layer in sorted(simulation.seen)]
        left = [simulation.live[layer] for layer in sorted(simulation.live)]
        layers = [KeptLayer(each.key[None], each.value[None], len(tokens) - each.count) for each in left]
        return CompressedCache(layers, float(torch.stack(counted).double().mean()), len(tokens), first_query)

    def _schedule(self, setting: Any, tokens: int, text: tuple[int, int] | None) -> Schedule:
        sinks, window = min(SINKS, tokens - 1), min(setting["window"], max(1, tokens - SINKS))
        if self.pins:
            if text is None:
                raise SmartKVError(
                    f"contender '{self.name}' keeps instruction and question, and these texts do not say which tokens "
                    "these are: leave it out"
                )
            sinks, window = min(max(sinks, text[0]), tokens - 1), max(1, tokens - text[1])
        budget = max(sinks + window, round(setting["share"] * tokens))
        return Once(tokens, budget, window, sinks)  # type: ignore[return-value]


def compressing_rule(name: str, lm: Backbone, tokens: int, seed: int = 0) -> CompressingRule:
    """Make the contender of a published rule that compresses prompts once.

    Args:
        name: one of `COMPRESSING`.
        lm: the model.
        tokens: tokens of a text for which a footprint must be in reach.
        seed: of random scores.
    """
    method = Random(seed) if name in (RANDOM, RANDOM_PINNED) else METHODS[name]()
    return CompressingRule(lm, name, method, tokens)
