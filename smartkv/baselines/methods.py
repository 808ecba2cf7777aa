"""Published rules of which keys stay, each a score of the keys that are left: the larger stay.

What each takes at inference is in `needs`: a method that needs attention weights cannot work with fused kernels as they
are.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.baselines.state import LATEST, LiveKeys, Needs
from smartkv.errors import SmartKVError


class Method(ABC):
    """Attributes: `name`, and `needs`, what it takes at inference beside the cache's own bookkeeping."""

    name: str
    needs: Needs = "keys"

    @abstractmethod
    def score(self, live: LiveKeys, window: int) -> Tensor:
        """float32 `[kv_heads, keys]` of what is left; `window`: the latest tokens, which stay in any case."""


class StreamingLLM(Method):
    """Sinks and the most recent keys (Xiao et al. 2023, arXiv 2309.17453)."""

    name = "streaming_llm"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        return live.position.float()


class Random(Method):
    """A figure for each key, drawn at its birth: what stays is a fair sample of what was read."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, live: LiveKeys, window: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + live.layer)
        drawn = torch.rand(live.read, live.kv_heads, generator=generator).T  # row by row: more text changes no figure
        return drawn.to(live.key.device).gather(1, live.position)


class KeyNorm(Method):
    """Keys of small L2 norm stay (Devoto et al. 2024, arXiv 2406.11430)."""

    name = "key_norm"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        return -live.key.float().norm(dim=-1)


class KeyDiff(Method):
    """Keys stay that are least like the mean direction of those that are left (Park et al. 2025, arXiv 2504.15364)."""

    name = "keydiff"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        key = live.key.float()
        anchor = F.normalize(key, dim=-1).mean(dim=1, keepdim=True)
        return -F.cosine_similarity(key, anchor, dim=-1)


class SnapKV(Method):
    """What the latest queries look at, smoothed over neighbours (Li et al. 2024, arXiv 2404.14469).

    Args:
        queries: how many of the latest look; of these only queries inside the window, as in the paper.
        kernel: neighbours that are averaged, odd.
    """

    name = "snapkv"
    needs: Needs = "attention weights"

    def __init__(self, queries: int = 32, kernel: int = 5) -> None:
        if not 1 <= queries <= LATEST or kernel < 1 or kernel % 2 == 0:
            raise SmartKVError(f"queries must be 1 to {LATEST} and the kernel odd, got {queries} and {kernel}")
        self.queries, self.kernel = queries, kernel

    def score(self, live: LiveKeys, window: int) -> Tensor:
        looked = live.attention_of_latest(min(self.queries, window)).mean(dim=2)  # [kv_heads, group, keys]
        smooth = F.avg_pool1d(looked, self.kernel, stride=1, padding=self.kernel // 2)
        return smooth.mean(dim=1)


class TOVA(Method):
    """What the last query looks at, mean over all heads of the layer (Oren et al. 2024, arXiv 2401.06104).

    Heads drop different keys only where their keys differ: here all heads of a layer keep the same ones.
    """

    name = "tova"
    needs: Needs = "attention weights"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        looked = live.attention_of_latest(1)[:, :, 0].mean(dim=(0, 1))
        return looked.expand(live.kv_heads, -1)


class H2O(Method):
    """Attention that a key has got so far, summed over queries (Zhang et al. 2023, arXiv 2306.14048)."""

    name = "h2o"
    needs: Needs = "attention weights"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        return live.accumulated


class ExpectedAttention(Method):
    """Attention that is expected of queries to come, times the value's norm (Devoto et al. 2025, arXiv 2510.00636).

    Queries before the rotary embedding are taken for normally distributed, with the mean and covariance of those so
    far, and turned by the mean rotation of the positions to come.

    Args:
        future: positions to come.
        epsilon: added to the attention before it is multiplied by the norm.
    """

    name = "expected_attention"
    needs: Needs = "queries"

    def __init__(self, future: int = 512, epsilon: float = 0.0) -> None:
        if future < 1 or epsilon < 0:
            raise SmartKVError(f"future must be at least 1 and epsilon at least 0, got {future} and {epsilon}")
        self.future, self.epsilon = future, epsilon

    def score(self, live: LiveKeys, window: int) -> Tensor:
        mean = live.total / live.read
        covariance = live.outer / live.read - mean[..., None] * mean[..., None, :]
        coming = torch.arange(live.read, live.read + self.future, device=mean.device)
        turn = live.rotation.mean_matrix(coming, mean.shape[-1])
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        key = live.key.float()[:, None]  # [kv_heads, 1, keys, head_dim]
        logits = (key @ mean[..., None])[..., 0] * live.scaling
        logits = logits + ((key @ covariance) * key).sum(dim=-1) * (live.scaling**2 / 2)
        expected = logits.softmax(dim=-1).mean(dim=1)
        return (expected + self.epsilon) * live.value.float().norm(dim=-1)
