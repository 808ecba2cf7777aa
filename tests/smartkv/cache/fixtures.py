"""Models, TTLs and padding for the tests of the cache, and caches whose decisions a test gives or reads."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.hybrid import FOREVER, HybridPolicy, LayerRule
from tests.models import FAMILIES
from tests.smartkv.cache.masked_reference import masked_logits, positions, visibility

MODELS = {name: make() for name, make in FAMILIES.items()}


class Injected(LifespanCache):
    """TTLs from a table `[layers, batch, kv_heads, real tokens]`."""

    table: Tensor
    score_table: Tensor | None = None

    def scores(self, layer: int, keys: Tensor) -> Tensor | None:
        if self.score_table is None:
            return super().scores(layer, keys)
        return self.score_table[layer].gather(2, self.index)

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        self.index = position.clamp(min=0)[:, None].expand(keys.shape[:3])
        return self.table[layer].gather(2, self.index)


class Recording(LifespanCache):
    """Keeps what was decided."""

    def times_to_live(self, layer: int, keys: Tensor, position: Tensor) -> Tensor | int:
        ttl = super().times_to_live(layer, keys, position)
        self.decided = getattr(self, "decided", {})
        self.decided.setdefault(layer, []).append(ttl)
        return ttl


def recent(window: int, sinks: int = 0) -> HybridPolicy:
    return HybridPolicy((LayerRule("all", "window", window),), sinks=sinks)


GATED = HybridPolicy((LayerRule("all", "gated", 3),), sinks=1, price=0.0)


def random_gates(model: PreTrainedModel) -> GateBank:
    """Their predictions lie on both sides of the price of `GATED`."""
    torch.manual_seed(1)
    return GateBank(Fingerprint.of(model))


def gated_logits(model: PreTrainedModel, gates: GateBank, ids: Tensor) -> Tensor:
    """Logits of a masked full cache over `ids` `[1, tokens]`, by what `gates` decide under `GATED`."""
    real, cache = torch.ones_like(ids, dtype=torch.bool), Recording(model, gates, GATED, chunk=ids.shape[1])
    fed(model, cache, ids, real, [])
    rule = GATED.rules[0]
    masks = [visibility(ttl[0], rule.window or 0, GATED.sinks, real, sliding(model)) for ttl in cache.decided.values()]
    return masked_logits(model, ids, masks, real)


def kv_heads(model: PreTrainedModel) -> int:
    return Fingerprint.of(model).kv_heads


def sliding(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "sliding_window", None) if model.config.model_type == "mistral" else None


def random_ttl(model: PreTrainedModel, batch: int, tokens: int, seed: int) -> Tensor:
    """Short and long lives, and some for good."""
    generator = torch.Generator().manual_seed(seed)
    shape = (Fingerprint.of(model).layers, batch, kv_heads(model), tokens)
    ttl = torch.randint(0, tokens, shape, generator=generator)
    ttl[torch.rand(shape, generator=generator) < 0.4] = 0
    ttl[torch.rand(shape, generator=generator) < 0.1] = FOREVER
    return ttl


def padding(batch: int, tokens: int, side: str, seed: int) -> Tensor:
    """bool `[batch, tokens]`, False at up to half a row's tokens on one side; the first row has none."""
    real = torch.ones(batch, tokens, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for row in range(1, batch):
        count = int(torch.randint(0, tokens // 2, (1,), generator=generator))
        if side == "left":
            real[row, :count] = False
        else:
            real[row, tokens - count :] = False
    return real


@torch.inference_mode()
def fed(model: PreTrainedModel, cache: LifespanCache, ids: Tensor, real: Tensor, cuts: Sequence[int]) -> Tensor:
    """Logits when the sequence is given in several calls."""
    edges = [0, *sorted(set(cuts)), ids.shape[1]]
    parts = []
    with cache:
        for start, stop in itertools.pairwise(edges):
            here = slice(start, stop)
            call = {"attention_mask": real[:, :stop].long(), "position_ids": positions(real)[:, here]}
            parts.append(model(ids[:, here], past_key_values=cache, use_cache=True, **call).logits)
    return torch.cat(parts, dim=1)


def state(model: PreTrainedModel) -> list[object]:
    modules = list(model.modules())
    hooks = [len(module._forward_hooks) for module in modules]
    attributes = [sorted(module.__dict__) for module in modules]
    configs = [type(module.__dict__.get("config")) for module in modules]
    return [model.config._attn_implementation, hooks, attributes, configs]


def tensors_of(thing: Any) -> list[Tensor]:
    """All tensors that an object leads to, by attributes and items."""
    found, known, open_ends = [], set(), [thing]
    while open_ends:
        here = open_ends.pop()
        if id(here) in known:
            continue
        known.add(id(here))
        if isinstance(here, Tensor):
            found.append(here)
        elif isinstance(here, dict):
            open_ends += here.values()
        elif isinstance(here, list | tuple | set):
            open_ends += here
        elif hasattr(here, "__dict__") and not isinstance(here, type):
            open_ends += vars(here).values()
    return found
