"""A press for NVIDIA's kvpress that scores keys with SmartKV's gates.

Example:
    press = LifespanPress(compression_ratio=0.75, gates="smollm2-135m-instruct")
    with press(model):
        model(input_ids, past_key_values=cache)

kvpress compresses once, after a prefill that saw every key. This module needs the extra `kvpress`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.wrappers import attention_layer

try:
    from kvpress import ScorerPress
    from kvpress.utils import get_prerope_key_states
except ImportError as error:
    raise ImportError(
        "smartkv.press needs kvpress: pip install 'smartkv[kvpress]', in an environment of its own, "
        "because kvpress needs transformers below 5.3"
    ) from error

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")  # whose keys before the rotary embedding kvpress reads


@dataclass
class LifespanPress(ScorerPress):
    """Press that keeps the keys with the highest scores of their gates.

    Gates that judge by age give their score at the last age, which decides whether a key stays for good.

    The press works in an `AdaKVPress` (budgets by head) and in a `DMSPress` (one price, while decoding too). A
    `ChunkPress` or `BlockPress` passes pieces of a text, in which no key is pinned. If fewer keys than sinks and window
    may stay, some of these are evicted.

    Args:
        compression_ratio: Share of the keys that are evicted.
        gates: A GateBank, or a folder, shipped name or hub id of gates.
        sinks: Number of tokens at the start that always stay.
        window: Number of latest tokens of the prefill that always stay. In a `DMSPress`, which has a window of its
            own, set it to 0.

    Raises:
        SmartKVError: There are no gates, the gates belong to another model, kvpress cannot read the keys of its family,
            or a number is below 0.
    """

    gates: GateBank | Path | str | None = None
    sinks: int = 4
    window: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gates is None:
            raise SmartKVError("a LifespanPress needs gates: give a GateBank, or a folder, name or hub id of gates")
        if min(self.sinks, self.window) < 0:
            raise SmartKVError(f"sinks and window must be at least 0 tokens, got {self.sinks} and {self.window}")
        self.bank = self.gates if isinstance(self.gates, GateBank) else GateBank.from_pretrained(self.gates)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Check that the gates fit `model` and move them to its device.

        Raises:
            SmartKVError: The gates belong to another model.
        """
        self._check(model.config)
        self.bank = self.bank.to(model.device)

    def _check(self, config: Any) -> None:
        arch, expected = Architecture.of(config), self.bank.fingerprint
        if arch.model_type not in FAMILIES:
            raise SmartKVError(
                f"kvpress cannot read the keys of the family {arch.model_type}: a press takes {', '.join(FAMILIES)}, "
                "a LifespanCache takes it too"
            )
        model = Fingerprint(arch.model_type, arch.layers, arch.kv_heads, arch.head_dim, expected.weight_hash)
        model.check(expected, "the gates of this press")

    @torch.no_grad()
    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        """Score the tokens in `hidden_states`, as kvpress calls it.

        Sinks and the window get the largest score.

        Args:
            module: Attention module of the layer.
            hidden_states: Inputs of the layer's attention, `[batch, tokens, hidden]`.
            keys: Keys in the cache, `[batch, kv_heads, tokens, head_dim]`.
            values: Values in the cache, not used.
            attentions: Attention weights, not used.
            kwargs: Arguments of the attention module, of which `cache_position` is used if there is one.

        Returns:
            float32 `[batch, kv_heads, tokens]`.

        Raises:
            SmartKVError: The gates belong to another model, or there are keys without hidden states.
        """
        self._check(module.config)  # presses that wrap this one do not always call post_init_from_model
        if hidden_states.shape[1] != keys.shape[2]:
            raise SmartKVError(
                f"a LifespanPress needs the hidden state of every key, got {hidden_states.shape[1]} for "
                f"{keys.shape[2]} keys: put it first in a ComposedPress, and use a DMSPress in place of a DecodingPress"
            )
        layer = attention_layer(module)
        score = self.bank.single_score(self.bank.score(layer, get_prerope_key_states(module, hidden_states)))
        new = score.shape[-1]
        last = int(kwargs["cache_position"][-1]) + 1 if "cache_position" in kwargs else new
        position = torch.arange(last - new, last, device=score.device)
        prefilling = last == new
        pinned = (position < self.sinks) | ((position >= last - self.window) & prefilling)
        return score.masked_fill(pinned, torch.finfo(score.dtype).max)
