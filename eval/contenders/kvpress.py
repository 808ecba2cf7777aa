"""Presses of NVIDIA's kvpress as contenders for protocol `once`: its own methods, and a press that asks the gates.

kvpress does not work with transformers 5.3 and later. Install the extra `kvpress` into an environment of its own.
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
# the input of each at inference, read from the code of kvpress 0.5.5
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
SINKS, WINDOW = 4, 16  # tokens that LifespanPress always keeps


def check_press(name: str, gates: GateBank | None) -> Any:
    """Return the module kvpress, after checking that there is such a press and that it has its gates.

    Args:
        name: `press:` and one of `NEEDS`.
        gates: for `lifespan`; None: there are none.

    Raises:
        SmartKVError: an unknown name, gates that are missing, or kvpress is not installed.
    """
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
    return kvpress


class PressContender:
    """A press by its name.

    `lifespan` is `smartkv.press.LifespanPress`; the others are kvpress's own. `ada_…` wraps a press into kvpress's
    AdaKVPress, which gives each head a budget of its own. `dms_…` wraps it into kvpress's DMSPress, which has one
    threshold for all heads of all layers.

    Args:
        lm: the model.
        gates: for `lifespan`; None: there are none.
        name: `press:` and one of `NEEDS`.
        windows: calibration texts, ids `[tokens]` each, on which a threshold is solved.
        prefill: tokens after which keys are evicted.

    Raises:
        SmartKVError: an unknown name, gates that are missing, or kvpress is not installed.
    """

    def __init__(
        self, lm: Backbone, gates: GateBank | None, name: str, windows: Sequence[Tensor], prefill: int
    ) -> None:
        self.kvpress = check_press(name, gates)
        press = name.removeprefix(PREFIX)
        self.lm, self.gates, self.name, self.press, self.prefill = lm, gates, name, press, prefill
        self.kind, self.needs = ("ours" if "lifespan" in press else "rule"), NEEDS[press]
        self.windows = windows

    @torch.no_grad()
    def solved(self, footprint: float) -> Any:
        """Find the compression ratio, or the threshold of DMSPress; see `Contender.solved`."""
        if self.press == "ada_expected_attention":
            return {"compression_ratio": 1 - footprint, "epsilon": 0.01}  # the value of kvpress's own benchmark
        if self.press != "dms_lifespan":
            return {"compression_ratio": 1 - footprint}
        tables = [GateScores(self.lm, self._gates)(tokens) for tokens in self.windows]
        policy = HybridPolicy((LayerRule("all", "gated", WINDOW),), sinks=SINKS)
        return {"threshold": price_for_share(tables, footprint, self.prefill, policy)}

    @property
    def _gates(self) -> GateBank:
        if self.gates is None:  # refused in __init__
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
        press = classes[self.press.removeprefix("ada_")](**setting)
        return k.AdaKVPress(press) if self.press.startswith("ada_") else press

    @torch.inference_mode()
    def read(self, setting: Any, tokens: Tensor, first_token: int, first_query: int, prefill: int | None) -> Reading:
        """Read a text whose prefill is compressed; see `Contender.read`.

        Raises:
            SmartKVError: `prefill` is None.
        """
        if prefill is None:
            raise SmartKVError(f"contender '{self.name}' compresses once: it is for --protocol once")
        model, ids = self.lm.model, tokens.long()[None].to(self.lm.model.device)
        implementation = model.config._attn_implementation
        cache, modules = DynamicCache(), attention_modules(model)
        try:
            if self.press == "observed_attention":
                model.set_attn_implementation("eager")  # this press reads the attention weights
            for module in modules:
                module.masked_key_indices = None  # type: ignore[assignment]
            with torch.random.fork_rng(), self._make(setting)(model):
                # RandomPress with its own seed would draw the same keys in every layer. We seed the shared generator.
                torch.manual_seed(int(tokens.sum()))
                prefilled = model.base_model(input_ids=ids[:, :prefill], past_key_values=cache, use_cache=True)
            hidden = [module.masked_key_indices for module in modules]
            if any(keys is not None for keys in hidden):
                ttl = self._lifetimes(hidden, len(tokens), prefill)
                reading = read_with_lifetimes(self.lm, ttl, tokens, first_token, first_query)
                return reading._replace(peak_bytes=None)  # kvpress itself frees nothing here
            # kvpress too gives positions and no cache_position, so that the mask counts the keys that are left
            position = torch.arange(prefill, len(tokens) - 1, device=ids.device)[None]
            rest = model.base_model(
                input_ids=ids[:, prefill:-1], past_key_values=cache, position_ids=position, use_cache=True
            )
        finally:
            model.set_attn_implementation(implementation)
            for module in modules:
                module.masked_key_indices = None  # type: ignore[assignment]
        states = torch.cat([prefilled.last_hidden_state[0], rest.last_hidden_state[0]])
        losses = losses_after(model, states[query_before(first_token) :], ids[0, first_token:])
        later = len(tokens) - 1 - prefill
        keys = [layer.keys for layer in cache.layers]  # type: ignore[union-attr]
        kept = sum(k.shape[2] - later for k in keys if k is not None) / len(modules)
        return Reading(*losses, _footprint(kept, prefill, first_query, len(tokens) - 1), None)

    def _lifetimes(self, hidden: Sequence[Any], tokens: int, prefill: int) -> Tensor:
        """Return TTLs by which the keys that kvpress hides are evicted at the end of the prefill.

        kvpress replaces a hidden key by one that no query should look at. With many hidden keys some queries do look at
        them (with a score of −1, on a tiny model). So we only take from kvpress which keys it hides.

        Args:
            hidden: by layer, indices (rows, heads, positions) of hidden keys, or None.
            tokens: tokens of the text.
            prefill: tokens of the prefill.

        Returns:
            int64 `[layers, kv_heads, tokens]`.
        """
        arch = self.lm.architecture
        ttl = torch.full((arch.layers, arch.kv_heads, tokens), FOREVER)
        for layer, keys in enumerate(hidden):
            if keys is not None:
                _, heads, positions = (index.cpu() for index in keys)
                ttl[layer, heads, positions] = prefill - positions
        return ttl


def _footprint(kept: float, prefill: int, first_query: int, stop: int) -> float:
    """Return Σ keys seen ÷ Σ keys of a full cache over the queries `first_query ≤ i < stop`.

    Queries of the prefill see all keys; later ones see the `kept` keys of the prefill and all that follow.
    """
    query = torch.arange(first_query, stop, dtype=torch.float64)
    seen = torch.where(query < prefill, query + 1, kept + query - prefill + 1)
    return float(seen.sum() / (query + 1).sum())
