"""NVIDIA's presses as contenders, as their own code has them, and gates in one: for protocol `once`.

kvpress takes no transformers from 5.3 on, so it lives in an environment of its own: extra `kvpress`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from eval.contenders.base import Reading
from eval.contenders.scored import GateScores, price_for_share, read_with_lifetimes
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.metrics.perplexity import losses_after, query_before
from smartkv.models.architecture import attention_modules
from smartkv.models.backbone import Backbone
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from smartkv.policies.lifetimes import FOREVER

PREFIX = "press:"
# what each takes at inference: our own look at the code of kvpress 0.5.5
NEEDS = {
    "knorm": "keys",
    "keydiff": "keys",
    "random": "nothing",
    "streaming_llm": "nothing",
    "snapkv": "attention weights",
    "tova": "attention weights",
    "observed_attention": "attention weights",
    "expected_attention": "queries",
    "ada_snapkv": "attention weights",
    "ada_expected_attention": "queries",
    "lifespan": "keys",
    "ada_lifespan": "keys",
    "dms_lifespan": "keys",
}
SINKS, WINDOW = 4, 16  # tokens that our press always keeps


class PressContender:
    """A press, by name: kvpress's own; `lifespan` is ours. `ada_…`: in kvpress's AdaKVPress, with budgets by head.
    `dms_…`: in its DMSPress, with one price for all heads of all layers."""

    def __init__(
        self, lm: Backbone, gates: GateBank | None, name: str, windows: Sequence[Tensor], prefill: int
    ) -> None:
        press = name.removeprefix(PREFIX)
        if press not in NEEDS:
            raise SmartKVError(f"there is no '{name}': expected {', '.join(PREFIX + known for known in NEEDS)}")
        if "lifespan" in press and gates is None:
            raise SmartKVError(f"contender '{name}' needs gates: give --gates")
        try:
            import kvpress
        except ImportError as error:
            raise SmartKVError(
                f"contender '{name}' needs kvpress: pip install 'smartkv[kvpress]' in an environment of its own"
            ) from error
        self.lm, self.gates, self.name, self.press, self.prefill = lm, gates, name, press, prefill
        self.kind, self.needs = ("ours" if "lifespan" in press else "rule"), NEEDS[press]
        self.windows, self.kvpress = windows, kvpress

    @torch.no_grad()
    def solved(self, footprint: float) -> Any:
        if self.press == "ada_expected_attention":
            return {"compression_ratio": 1 - footprint, "epsilon": 0.01}  # as kvpress's own benchmark has it
        if self.press != "dms_lifespan":
            return {"compression_ratio": 1 - footprint}
        tables = [GateScores(self.lm, self._gates)(tokens) for tokens in self.windows]
        policy = HybridPolicy((LayerRule("all", "gated", WINDOW),), sinks=SINKS)
        return {"threshold": price_for_share(tables, footprint, self.prefill, policy)}

    @property
    def _gates(self) -> GateBank:
        if self.gates is None:  # told in __init__
            raise SmartKVError(f"contender '{self.name}' needs gates")
        return self.gates

    def _make(self, setting: Any) -> Callable[[Any], AbstractContextManager[None]]:
        k = self.kvpress
        if "lifespan" in self.press:
            from smartkv.press import LifespanPress

            if self.press == "dms_lifespan":
                inner = LifespanPress(gates=self._gates, sinks=SINKS, window=0)
                return k.DMSPress(inner, setting["threshold"], sliding_window_size=WINDOW)
            own = LifespanPress(setting["compression_ratio"], self._gates, SINKS, WINDOW)
            return k.AdaKVPress(own) if self.press.startswith("ada_") else own
        classes = {
            "knorm": k.KnormPress,
            "keydiff": k.KeyDiffPress,
            "random": k.RandomPress,
            "streaming_llm": k.StreamingLLMPress,
            "snapkv": k.SnapKVPress,
            "tova": k.TOVAPress,
            "observed_attention": k.ObservedAttentionPress,
            "expected_attention": k.ExpectedAttentionPress,
        }
        found = classes[self.press.removeprefix("ada_")](**setting)
        return k.AdaKVPress(found) if self.press.startswith("ada_") else found

    @torch.inference_mode()
    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        if prefill is None:
            raise SmartKVError(f"contender '{self.name}' compresses once: it is for --protocol once")
        model, ids = self.lm.model, tokens.long()[None].to(self.lm.model.device)
        implementation = model.config._attn_implementation
        cache, modules = DynamicCache(), attention_modules(model)
        try:
            if self.press == "observed_attention":
                model.set_attn_implementation("eager")  # it is given the weights
            for module in modules:
                module.masked_key_indices = None
            with torch.random.fork_rng(), self._make(setting)(model):
                # RandomPress with a seed of its own draws the same for every layer: we seed the generator it shares
                torch.manual_seed(int(tokens.sum()))
                prefilled = model.base_model(input_ids=ids[:, :prefill], past_key_values=cache, use_cache=True)
            hidden = [module.masked_key_indices for module in modules]
            if any(keys is not None for keys in hidden):
                ttl = self._times(hidden, len(tokens), prefill)
                found = read_with_lifetimes(self.lm, ttl, tokens, first_token, first_query)
                return found._replace(peak_bytes=None)  # kvpress frees nothing here
            # positions, and no cache_position: kvpress's own way, by which the mask counts what is left
            position = torch.arange(prefill, len(tokens) - 1, device=ids.device)[None]
            rest = model.base_model(
                input_ids=ids[:, prefill:-1], past_key_values=cache, position_ids=position, use_cache=True
            )
        finally:
            model.set_attn_implementation(implementation)
            for module in modules:
                module.masked_key_indices = None
        states = torch.cat([prefilled.last_hidden_state[0], rest.last_hidden_state[0]])
        losses = losses_after(model, states[query_before(first_token) :], ids[0, first_token:])
        later = len(tokens) - 1 - prefill
        kept = sum(layer.keys.shape[2] - later for layer in cache.layers) / len(modules)
        return Reading(*losses, _footprint(kept, prefill, first_query, len(tokens) - 1), None)

    def _times(self, hidden: Sequence[Any], tokens: int, prefill: int) -> Tensor:
        """TTLs `[layers, kv_heads, tokens]` by which what kvpress hides in each layer, as (rows, heads, positions) or
        None, goes after the prefill.

        kvpress puts in the place of a hidden key one that no query of the call is to look at. Where these are many,
        some do (with a score of −1, on a tiny model): so we only ask it which keys it hides.
        """
        arch = self.lm.architecture
        ttl = torch.full((arch.layers, arch.kv_heads, tokens), FOREVER)
        for layer, keys in enumerate(hidden):
            if keys is not None:
                _, heads, positions = (index.cpu() for index in keys)
                ttl[layer, heads, positions] = prefill - positions
        return ttl


def _footprint(kept: float, prefill: int, first_query: int, stop: int) -> float:
    """Σ keys seen ÷ Σ keys of a full cache, over the queries `first_query ≤ i < stop`; the prefill sees all."""
    query = torch.arange(first_query, stop, dtype=torch.float64)
    seen = torch.where(query < prefill, query + 1, kept + query - prefill + 1)
    return float(seen.sum() / (query + 1).sum())
