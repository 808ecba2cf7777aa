"""LifespanCache: a KV cache that frees each key when its time to live is up.

    cache = LifespanCache(model, "smollm2-135m-instruct", footprint=0.25)
    model.generate(**inputs, past_key_values=cache)

Gates tell what each key is worth. Under a budget, all keys stay until it is reached, and then the least worthy go (see
`smartkv.policies.floating_price`). Under a fixed price, gates decide each key's time to live (TTL) at its birth.
Queries attend to the keys that are visible to them. Keys that no later query can see are freed: after every 256 tokens
of a prompt, and every few tokens while decoding.
"""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.arguments import resolve_arguments
from smartkv.cache.cache_budget import CacheBudget
from smartkv.cache.cache_edits import CacheEdits
from smartkv.cache.forward_pass import EvictionStep
from smartkv.cache.layer import Judge, LifespanLayer
from smartkv.cache.report import CacheReport
from smartkv.gates.bank import GateBank
from smartkv.policies.arguments import check_first_query
from smartkv.policies.figures import check_tokens
from smartkv.policies.floating_price import PINNED
from smartkv.policies.hybrid import HybridPolicy
from smartkv.policies.lifetimes import FOREVER
from smartkv.quantization.per_token import Bits

USUAL_ROLLBACK = 64  # tokens
LARGEST_WORTH = 60_000  # float16 can hold it, and no gate says more


class LifespanCache(CacheEdits):
    """A KV cache with eviction for `model(...)` and `model.generate(...)`.

    The cache replaces the forward of the model's decoder for as long as it lives. `detach()` restores the model at
    once, and `with cache:` at the end of the block. A call without such a cache computes what it always did.

    Args:
        model: a loaded causal LM of a supported family.
        gates: a GateBank of this model on its device; or a name of `pretrained_gates()`, a folder or a hub id, from
            which gates are loaded onto the model's device; None for a policy that needs none.
        policy: what each layer keeps: a HybridPolicy, the name of a policy, or a YAML file (see `read_policy`). Nothing
            in it is left open, unless a budget moves its price. None: the policy that the gates remember, under a
            budget.
        chunk: number of prompt tokens that go through the model together. Each layer frees its dead keys after every
            256 of them. No logit depends on it beyond rounding.
        first_query: position of the first query that the attribute `footprint` counts.
        bits: packs keys and values in 2 to 8 bits a number; two figures such as (6, 4) are for keys and for values (see
            `smartkv.quantization.per_token`). None: they stay in the model's dtype. With bits, logits depend within the
            error of quantisation on how many tokens the first call has, up to `chunk`: the mean key that is subtracted
            before packing is theirs.
        footprint: budget as a share of the full cache's keys at the planned length, above 0 and at most 1.
        max_tokens: budget as keys a KV head, mean over all heads of all layers.
        max_bytes: budget as bytes for all rows together: a number, or a text such as "200MB". Copies that moving keys
            takes come on top while a layer moves them (see `peak_bytes`).
        plan: planned length in tokens, prompt and answer, for `footprint`. None: what `generate` was asked for, else
            the tokens of the first call. A longer text stays within the same budget.
        pin_first: number of first tokens of each row, an instruction for example, that stay whatever the policy says.
        pin_last_prompt: the same of the last tokens of the first prompt, a question for example. Pinned keys count in
            the budget. See also `pin`.
        rollback: number of latest tokens that `crop` may drop, as assisted generation and prompt lookup do. Keys that
            would be freed within them stay so much longer, hidden. None: the shortest window,
            at most 64, and 0 under a policy with a cap.

    Raises:
        SmartKVError: an argument of a wrong type; model, gates and policy that do not fit together; neither or both of
            policy and budget.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: GateBank | str | Path | None = None,
        policy: HybridPolicy | str | Path | None = None,
        chunk: int = 1024,
        first_query: int = 0,
        bits: Bits | None = None,
        *,
        footprint: float | None = None,
        max_tokens: int | None = None,
        max_bytes: int | str | None = None,
        plan: int | None = None,
        pin_first: int = 0,
        pin_last_prompt: int = 0,
        rollback: int | None = None,
    ) -> None:
        architecture, self.gates, self.policy, budget = resolve_arguments(
            model, gates, policy, footprint, max_tokens, max_bytes, plan
        )
        self.rules = self.policy.rules_for(architecture.layers, architecture.sliding_windows)
        self.first_query, self.bits = check_first_query(first_query), bits
        if rollback is None:
            windows = [rule.window for rule in self.rules if rule.window]
            rollback = min([USUAL_ROLLBACK, *windows]) if self.policy.max_tokens is None else 0
        for name, tokens in (("rollback", rollback), ("pin_first", pin_first), ("pin_last_prompt", pin_last_prompt)):
            check_tokens(name, tokens, least=0)
        self.rollback, self.pin_first, self.pin_last_prompt = rollback, pin_first, pin_last_prompt
        self.start_pins()
        if pin_first or pin_last_prompt:
            self.check_pins()
        self.budget = None
        if budget is not None:
            pinned = self.pins.most(self.policy.sinks) + pin_last_prompt
            self.budget = CacheBudget(
                budget, architecture, self.gates, self.policy, bits, model.dtype, pinned, self.rollback
            )
        caps = self.policy.caps(architecture)
        prices = self.budget.prices if self.budget else [None] * architecture.layers
        self.storage = []
        for rule, cap, price in zip(self.rules, caps, prices, strict=True):
            lifetime = price.youngest if price else cap.window if cap else rule.window or FOREVER
            self.storage.append(LifespanLayer(lifetime, price or cap, first_query, bits, self.rollback))
        self._scored: tuple[int, Tensor, Tensor | None] | None = None
        super().__init__(model, list(self.storage), chunk)

    # -- the rule -----------------------------------------------------------------------------------------------------

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor | int:
        """Return the TTL of new keys, in tokens. A subclass with another rule overrides this method.

        Args:
            layer: index of the layer.
            keys: pre-RoPE, `[batch, kv_heads, tokens, head_dim]`.
            position: int64 `[batch, tokens]`, each token's index among the real tokens of its row.

        Returns:
            int64 `[batch, kv_heads, tokens]` from 0 to `FOREVER`, or one int for all keys. The layer's window is not
            included.
        """
        rule = self.rules[layer]
        if self.storage[layer].limit.floats:
            return FOREVER  # until the price lets it go
        if rule.rule != "gated" or self.gates is None:
            return self.policy.times_to_live(rule, None)
        return self.policy.times_to_live(rule, self._scores_once(layer, keys), self.gates.ages)

    def scores(self, layer: int, keys: Tensor) -> Tensor | None:
        """Return the scores that the layer's gates give new keys (see `GateBank.score`).

        Args:
            layer: index of the layer.
            keys: pre-RoPE, `[batch, kv_heads, tokens, head_dim]`.

        Returns:
            float32 `[batch, kv_heads, tokens]`, or `[…, ages]`; None if the layer has no gates.
        """
        if self.gates is None or layer not in self.gates.layers:
            return None
        return self.gates.score(layer, keys)

    def expiry(self, layer: int, keys: Tensor, position: Tensor, sliding_window: int | None) -> Tensor:
        """Return the first position whose query does not see each new key.

        Args:
            layer, keys, position: as in `times_to_live`.
            sliding_window: of the model itself, which hides sinks too; None: it has none.

        Returns:
            int64 `[batch, kv_heads, tokens]`.
        """
        ttl, born = self.times_to_live(layer, keys, position), position[:, None]
        lifetime = self.policy.lifetime(self.rules[layer], ttl, born)
        if len(self.pins):
            lifetime = lifetime.masked_fill(self.pins.cover(position)[:, None], FOREVER)
        if sliding_window is not None:
            lifetime = lifetime.clamp(max=sliding_window)
        return (born + lifetime).clamp(max=FOREVER).expand(keys.shape[:3])

    # -- a forward pass -----------------------------------------------------------------------------------------------

    def begin_call(self, tokens: int, real: Tensor | None, rows: int) -> None:
        """Pin the end of the prompt, and divide the budget among the layers, before the first token.

        Args:
            tokens: in each row of the call, padding included.
            real: bool `[batch, tokens]`, False for padding; None: no padding.
            rows: of the batch.

        Raises:
            SmartKVError: the budget is below what always stays.
        """
        if self.get_seq_length():
            return
        self.first_columns = tokens
        self.pins = deepcopy(self.asked_pins)
        lengths = torch.full((rows,), tokens) if real is None else real.sum(dim=1).cpu()
        if self.pin_last_prompt:
            prompt = lengths + max(0, (self.prompt_columns or tokens) - tokens)
            self.pins.add((prompt - self.pin_last_prompt).clamp(min=0), prompt)
        if self.budget is not None:
            coming = max(0, (self.planned_columns or tokens) - tokens)
            by_row = self.budget.keys_by_row((lengths + coming).tolist(), self.pins.most(self.policy.sinks))
            for storage, keys in zip(self.storage, by_row, strict=True):
                storage.limit.budget = keys

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Store the tokens of a forward pass in one layer, and compute their attention without gradients.

        Returns:
            `[batch, query_heads, tokens, head_dim]`, zeros for padding.

        Raises:
            SmartKVError: another number of rows, or another dtype, than the cache holds.
        """
        storage = self.storage[layer]
        if step.real is not None:  # the layers of a model may lie on several devices
            step = step._replace(real=step.real.to(step.key.device))
        output = storage.attend(step, self._judge_of(layer))
        if storage.call_peak_bytes:
            self.note_peak(storage)
        return output

    def _judge_of(self, layer: int) -> Judge:
        """Return the function that decides about the layer's new keys."""

        def judge(keys: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
            storage = self.storage[layer]
            limit = None if storage.sliding_window == FOREVER else storage.sliding_window
            try:
                expiry = self.expiry(layer, keys, position, limit)
                return expiry, self._rank(layer, keys, position) if storage.limit.ranked else None
            finally:
                self._scored = None

        return judge

    def _rank(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        """Return what new keys are stored with where the heads of a layer share a cap or a budget.

        Returns:
            Under a cap the scores that break ties, float32 `[batch, kv_heads, tokens]`. Under a budget the worth at
            each age, float16 `[…, ages]`.
        """
        score, shape = self._scores_once(layer, keys), keys.shape[:3]
        if self.storage[layer].limit.floats and self.gates is not None and score is not None:
            worth = score if self.gates.ages else score[..., None]
            worth = worth.clamp(-LARGEST_WORTH, LARGEST_WORTH).half()
            pinned = (position < self.policy.sinks) | self.pins.cover(position)
            return worth.masked_fill(pinned[:, None, :, None], PINNED)
        if score is None:
            return torch.zeros(shape, device=keys.device)
        return score if self.gates is None else self.gates.single_score(score)

    def _scores_once(self, layer: int, keys: Tensor) -> Tensor | None:
        """Return `scores`, computed once for both the TTL of the keys and their rank under a cap."""
        if self._scored is None or self._scored[0] != layer or self._scored[1] is not keys:
            self._scored = (layer, keys, self.scores(layer, keys))
        return self._scored[2]

    def report(self) -> CacheReport:
        """Return what the cache holds beside its budget, by layer: `print(cache.report())`.

        Raises:
            SmartKVError: the cache has not seen a token yet.
        """
        self._check_used()
        return CacheReport.of(self, None if self.budget is None else self.budget.budget, self.get_seq_length())
