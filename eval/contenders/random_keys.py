"""Random eviction while a text is read: a null that holds the same budget as the gates."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.gates.bank import GateBank
from smartkv.models.architecture import Fingerprint
from smartkv.policies.floating_price import PINNED
from smartkv.policies.hybrid import HybridPolicy, LayerRule

WINDOW = 16  # latest tokens that always stay, as many as under the gates that come with SmartKV
BLOCK = 1024  # positions whose worth is drawn together


class RandomCache(LifespanCache):
    """LifespanCache that holds a budget of keys whose worth is drawn at random.

    A key's worth depends on its position, its head and the seed alone. So those that stay are a random choice, and the
    same one whatever the calls.

    Args:
        model: a loaded causal LM of a supported family.
        seed: of the worth of keys.
        options: of `LifespanCache`; one of them is a budget.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0, **options: Any) -> None:
        """Make gates that nobody asks, because a floating price is one of gates."""
        self.seed, self.drawn = seed, dict[tuple[int, int], Tensor]()
        with torch.random.fork_rng(devices=[]):  # whoever draws afterwards draws what it would have drawn
            gates = GateBank(Fingerprint.of(model), None, 1, 1, {"ages": [WINDOW]}).to(model.device)
        policy = HybridPolicy((LayerRule("all", "gated", WINDOW),), name="random")
        super().__init__(model, gates, policy, **options)

    def _rank(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        worth = self._drawn(layer, int(position.max()) + 1).to(keys.device)[:, position].transpose(0, 1)
        pinned = (position < self.policy.sinks) | self.pins.cover(position)
        return worth.masked_fill(pinned[:, None], PINNED)[..., None]

    def _drawn(self, layer: int, tokens: int) -> Tensor:
        """Return the worth of the first keys, float16 `[kv_heads, tokens or more]`."""
        blocks = []
        for block in range(-(-tokens // BLOCK)):
            if (layer, block) not in self.drawn:
                generator = torch.Generator().manual_seed(hash((self.seed, layer, block)) % 2**63)
                noise = torch.randn(self.architecture.kv_heads, BLOCK, generator=generator)
                self.drawn[layer, block] = noise.half()
            blocks.append(self.drawn[layer, block])
        return torch.cat(blocks, dim=1)
