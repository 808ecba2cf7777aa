"""Published eviction methods, each a score of the keys that are left. Keys with the largest scores stay.

The attribute `needs` names what a method reads at inference. A method that needs attention weights does not work with
fused attention kernels as they are.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from smartkv.baselines.state import LATEST, LiveKeys, Needs
from smartkv.errors import SmartKVError


class Method(ABC):
    """Base class of eviction methods.

    Attributes:
        name: Name of the method.
        needs: What the method reads at inference beside keys and positions.
    """

    name: str
    needs: Needs = "keys"

    @abstractmethod
    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score the keys that are left.

        Args:
            live: The keys of one layer, with the statistics that the method needs.
            window: Number of latest tokens, which stay whatever their score.

        Returns:
            float32 `[kv_heads, keys]`.
        """


class StreamingLLM(Method):
    """Sinks and the most recent keys (Xiao et al. 2023, arXiv 2309.17453)."""

    name = "streaming_llm"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by position."""
        return live.position.float()


class Random(Method):
    """A random score for each key, drawn once, so that a fair sample of the tokens stays.

    Args:
        seed: Seed of the draws.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by a draw for each token and head."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + live.layer)
        drawn = torch.rand(live.read, live.kv_heads, generator=generator).T  # tokens first: more text changes no draw
        return drawn.to(live.key.device).gather(1, live.position)


class KeyNorm(Method):
    """L2 norm of keys, of which the smallest stay (Devoto et al. 2024, arXiv 2406.11430)."""

    name = "key_norm"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by their negative norm."""
        return -live.key.float().norm(dim=-1)


class KeyDiff(Method):
    """Distance from the mean direction of the keys that are left (Park et al. 2025, arXiv 2504.15364)."""

    name = "keydiff"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by their negative cosine similarity to the mean direction."""
        key = live.key.float()
        anchor = F.normalize(key, dim=-1).mean(dim=1, keepdim=True)
        return -F.cosine_similarity(key, anchor, dim=-1)


class SnapKV(Method):
    """Attention of the latest queries, smoothed over neighbouring keys (Li et al. 2024, arXiv 2404.14469).

    Args:
        queries: Number of latest queries. Only queries inside the window are used, as in the paper.
        kernel: Number of neighbouring keys that are averaged, odd.

    Raises:
        SmartKVError: A number is out of range.
    """

    name = "snapkv"
    needs: Needs = "attention weights"

    def __init__(self, queries: int = 32, kernel: int = 5) -> None:
        if not 1 <= queries <= LATEST or kernel < 1 or kernel % 2 == 0:
            raise SmartKVError(f"queries must be 1 to {LATEST} and the kernel odd, got {queries} and {kernel}")
        self.queries, self.kernel = queries, kernel

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by the smoothed attention of the latest queries."""
        attention = live.attention_of_latest(min(self.queries, window)).mean(dim=2)  # [kv_heads, group, keys]
        smooth = F.avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        return smooth.mean(dim=1)


class TOVA(Method):
    """Attention of the last query, mean over all heads of the layer (Oren et al. 2024, arXiv 2401.06104).

    All heads of a layer keep the same keys.
    """

    name = "tova"
    needs: Needs = "attention weights"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by the attention of the last query."""
        attention = live.attention_of_latest(1)[:, :, 0].mean(dim=(0, 1))
        return attention.expand(live.kv_heads, -1)


class H2O(Method):
    """Attention that a key got so far, summed over queries (Zhang et al. 2023, arXiv 2306.14048)."""

    name = "h2o"
    needs: Needs = "attention weights"

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by their accumulated attention."""
        return live.accumulated


class ExpectedAttention(Method):
    """Expected attention of future queries, times the norm of the value (Devoto et al. 2025, arXiv 2510.00636).

    Queries before the rotary embedding are assumed to be normally distributed, with the mean and covariance of the
    queries so far. They are rotated by the mean rotation of the future positions.

    Args:
        future: Number of future positions.
        epsilon: Added to the attention before it is multiplied by the norm.

    Raises:
        SmartKVError: A number is out of range.
    """

    name = "expected_attention"
    needs: Needs = "queries"

    def __init__(self, future: int = 512, epsilon: float = 0.0) -> None:
        if future < 1 or epsilon < 0:
            raise SmartKVError(f"future must be at least 1 and epsilon at least 0, got {future} and {epsilon}")
        self.future, self.epsilon = future, epsilon

    def score(self, live: LiveKeys, window: int) -> Tensor:
        """Score keys by expected attention times the norm of their value."""
        mean = live.query_sum / live.read
        covariance = live.query_outer_sum / live.read - mean[..., None] * mean[..., None, :]
        positions = torch.arange(live.read, live.read + self.future, device=mean.device)
        rotation = live.rotation.mean_matrix(positions, mean.shape[-1])
        mean, covariance = mean @ rotation.T, rotation @ covariance @ rotation.T
        key = live.key.float()[:, None]  # [kv_heads, 1, keys, head_dim]
        logits = (key @ mean[..., None])[..., 0] * live.softmax.scaling
        logits = logits + ((key @ covariance) * key).sum(dim=-1) * (live.softmax.scaling**2 / 2)
        expected = live.softmax.probabilities(logits[:, :, None]).mean(dim=(1, 2))
        return (expected + self.epsilon) * live.value.float().norm(dim=-1)
