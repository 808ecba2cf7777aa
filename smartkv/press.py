"""Gates inside NVIDIA's kvpress: what is scored there, scored by what SmartKV learnt.

    press = LifespanPress(compression_ratio=0.75, gates="smollm2-135m-instruct")
    with press(model):
        model(input_ids, past_key_values=cache)

kvpress compresses once, after a prefill that saw every key. Needs the extra `kvpress`.
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

try:
    from kvpress import ScorerPress
    from kvpress.utils import get_prerope_key_states
except ImportError as error:
    raise ImportError(
        "smartkv.press needs kvpress: pip install 'smartkv[kvpress]', in an environment of its own, "
        "since kvpress holds transformers below 5.3"
    ) from error


@dataclass
class LifespanPress(ScorerPress):
    """Keys stay by the score of their gates; of gates that judge for ages, the last: to stay for good.

    Args:
        compression_ratio: share of the keys that go.
        gates: gates, or their folder, name or hub id.
        sinks: tokens at the start that always stay.
        window: latest tokens of the prefill that always stay; in a `DMSPress`, which has a window of its own: 0.

    Raises:
        SmartKVError: no gates, or gates of another model.

    Works in an `AdaKVPress` (budgets by head) and in a `DMSPress` (one price, while decoding too). A `ChunkPress` or
    `BlockPress` hands over pieces of a text: in them nothing is pinned. Where fewer than sinks + window keys may stay,
    it is some of these.
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
        self._check(model.config)
        self.bank = self.bank.to(model.device)

    def _check(self, config: Any) -> None:
        arch, own = Architecture.of(config), self.bank.fingerprint
        model = Fingerprint(arch.model_type, arch.layers, arch.kv_heads, arch.head_dim, own.weight_hash)
        model.check(own, "the gates of this press")

    @torch.no_grad()
    def score(
        self, module: nn.Module, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
    ) -> Tensor:
        """kvpress's contract: float32 `[batch, kv_heads, tokens]` of the tokens in `hidden_states`.

        Raises:
            SmartKVError: gates of another model, or keys whose hidden states are not there.
        """
        self._check(module.config)  # presses around this one do not always call post_init_from_model
        if hidden_states.shape[1] != keys.shape[2]:
            raise SmartKVError(
                f"a LifespanPress needs the hidden state of every key, got {hidden_states.shape[1]} for "
                f"{keys.shape[2]} keys: put it first in a ComposedPress, and use a DMSPress in place of a DecodingPress"
            )
        layer: int = module.layer_idx  # type: ignore[assignment]
        score = self.bank.single_score(self.bank.score(layer, get_prerope_key_states(module, hidden_states)))
        new = score.shape[-1]
        last = int(kwargs["cache_position"][-1]) + 1 if "cache_position" in kwargs else new
        position = torch.arange(last - new, last, device=score.device)
        prefilling = last == new
        pinned = (position < self.sinks) | ((position >= last - self.window) & prefilling)
        return score.masked_fill(pinned, torch.finfo(score.dtype).max)
