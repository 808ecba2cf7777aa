"""LifespanCache: a KV cache from which keys are freed when their time to live is up.

    model.generate(**inputs, past_key_values=LifespanCache(model, gates, policy))

Each layer stores what is alive and nothing else: flat tensors over all rows and KV heads, `[live keys, head_dim]`, with
the position and the expiry of each key. A forward pass walks over its tokens in chunks: gates decide the TTL of the
chunk's keys, queries attend to what is visible to them, and what no later query can see is freed.
"""

import weakref
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from smartkv.attention import EvictionStep, offer_cache
from smartkv.backbones import Architecture, Fingerprint, attention_modules
from smartkv.errors import SmartKVError
from smartkv.feeding import follow_cache
from smartkv.gates import GateBank
from smartkv.policies import FOREVER, HybridPolicy
from smartkv.storage import HOLE, LifespanLayer


class LifespanCache(Cache):
    """A cache for `model(...)` and `model.generate(...)`.

    The model is changed while it works on the cache and not between. It keeps a forward of ours for as long as such a
    cache lives; `with cache:` takes that away at the block's end, `detach()` at once.

    Args:
        model: a causal LM of a supported family.
        gates: its gates; None for a policy that needs none.
        policy: what each layer keeps; nothing may be left open in it.
        chunk: tokens that are computed before memory is freed again; no logit depends on it beyond rounding.
        count_from: position of the first query that `footprint` counts.

    Raises:
        SmartKVError: model, gates and policy do not fit together.

    Attributes:
        peak_bytes: largest sum of storage so far, the chunk at work included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        gates: GateBank | None,
        policy: HybridPolicy,
        chunk: int = 256,
        count_from: int = 0,
    ) -> None:
        architecture = Architecture.of(model.config)
        if gates is not None:
            Fingerprint.of(model).check(gates.fingerprint, "the gates")
        self.rules = policy.check(architecture, gates)
        if policy.open:
            raise SmartKVError(
                f"policy '{policy.name}' leaves its {policy.open} open: give it, or solve it for a footprint"
            )
        if chunk < 1:
            raise SmartKVError(f"chunk must be at least 1 token, got {chunk}")
        self.storage = [LifespanLayer() for _ in range(architecture.layers)]
        super().__init__(layers=list(self.storage))
        self.model, self.policy, self.gates = model, policy, gates
        self.chunk, self.count_from, self.peak_bytes = chunk, count_from, 0
        self._modules = attention_modules(model)
        self.attach()

    # -- attach and detach --------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Let the model take this cache; done by the constructor."""
        self._undo = follow_cache(self.model, LifespanCache)
        self._finalizer = weakref.finalize(self, self._undo)
        self.attached = True

    def detach(self) -> None:
        """Leave the model as it was; what is stored stays. Called again, it does nothing."""
        self.attached = False
        self._finalizer()

    def __enter__(self) -> "LifespanCache":
        if not self.attached:
            self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- the rule -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor | int:
        """TTL of new keys, in tokens: what a subclass overrides to decide otherwise.

        Args:
            layer: index of the layer.
            keys: before the rotary embedding, `[batch, kv_heads, tokens, head_dim]`.
            position: int64 `[batch, tokens]`, each token's place among the real tokens of its row.

        Returns:
            int64 `[batch, kv_heads, tokens]`, 0 … `FOREVER`; or one figure for all. The layer's window comes on top.
        """
        rule = self.rules[layer]
        if rule.rule != "gated" or self.gates is None:
            return self.policy.times_to_live(rule, None)
        return self.policy.times_to_live(rule, self.gates.predict(layer, keys)[..., 0])

    def expiry(self, layer: int, keys: Tensor, position: Tensor, sliding_window: int | None) -> Tensor:
        """First position whose query does not see each new key, int64 `[batch, kv_heads, tokens]`. Arguments as above;
        `sliding_window`: the model's own, which hides sinks too."""
        ttl, born = self.times_to_live(layer, keys, position), position[:, None]
        lifetime = self.policy.lifetime(self.rules[layer], ttl, born)
        if sliding_window is not None:
            lifetime = lifetime.clamp(max=sliding_window)
        return (born + lifetime).clamp(max=FOREVER).expand(keys.shape[:3])

    def attend(self, layer: int, step: EvictionStep) -> Tensor:
        """Attention of one layer over the tokens of a forward pass; `[batch, query_heads, tokens, head_dim]`."""
        storage, tokens = self.storage[layer], step.key.shape[2]
        if not storage.is_initialized:
            storage.lazy_initialization(step.key, step.value)
        if len(storage.seen) != len(step.key):
            raise SmartKVError(f"the cache holds {len(storage.seen)} rows, the model was given {len(step.key)}")
        real = step.real if step.real is not None else step.key.new_ones(len(step.key), tokens, dtype=torch.bool)
        position = storage.seen[:, None] + real.cumsum(dim=1) - 1
        expiry = self.expiry(layer, step.pre_rope, position, step.sliding_window).int()
        position = position.masked_fill(~real, HOLE)[:, None].expand(expiry.shape).int()
        outputs = []
        for start in range(0, tokens, self.chunk):
            here = slice(start, start + self.chunk)
            new = [tensor[:, :, here] for tensor in (step.key, step.value, position, expiry)]
            held = self.storage_bytes
            window = step.sliding_window or FOREVER
            output, bytes_at_work = storage.step(step.query[:, :, here], new, step.scaling, self.count_from, window)
            self.peak_bytes = max(self.peak_bytes, held + bytes_at_work)
            outputs.append(output)
        storage.columns += tokens
        return torch.cat(outputs, dim=2)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model just before attention: says to the attention function which cache it works on."""
        if not self.attached:
            raise SmartKVError("the cache was detached from its model: call cache.attach(), or use it in `with cache:`")
        offer_cache(self._modules[layer_idx], self)
        return key_states, value_states

    def reset(self) -> None:
        """Forget everything, as if new."""
        super().reset()
        self.peak_bytes = 0

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def storage_bytes(self) -> int:
        """Bytes that all layers hold now: keys, values, positions, expiries, counts."""
        return sum(layer.storage_bytes for layer in self.storage)

    @property
    def live_keys(self) -> Tensor:
        """int64 `[layers, batch, kv_heads]`, on the CPU.

        Raises:
            SmartKVError: no token has been seen.
        """
        self._check_used()
        return torch.stack([layer.counts.cpu() for layer in self.storage])

    @property
    def footprint_by_head(self) -> Tensor:
        """Share of a full cache's keys that the counted queries saw, float64 `[layers, kv_heads]`.

        Raises:
            SmartKVError: no query was counted.
        """
        self._check_used()
        if not int(self.storage[0].held.sum()):
            raise SmartKVError(f"no query from position {self.count_from} on was seen: there is no footprint")
        return torch.stack([(layer.visible.sum(0).double() / layer.held.sum()).cpu() for layer in self.storage])

    @property
    def footprint(self) -> float:
        """Σ keys seen ÷ Σ keys of a full cache, over KV heads and the counted queries. Raises as above."""
        return float(self.footprint_by_head.mean())

    def _check_used(self) -> None:
        if not all(layer.is_initialized for layer in self.storage):
            raise SmartKVError("the cache has not seen a token yet")

    def crop(self, *_: Any) -> None:
        """
        Raises:
            SmartKVError: always; what was freed cannot come back.
        """
        raise SmartKVError("a LifespanCache cannot be cropped: keys that were freed cannot come back")
