"""A model's rotary embedding (RoPE, Su et al. 2021): undo it, or average it over positions."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.models.wrappers import input_device


@dataclass(frozen=True)
class SwitchingRotary:
    """A rotary embedding whose frequencies depend on the length of a call.

    Attributes:
        rope_type: `dynamic` or `longrope`.
        length: Longest sequence, in tokens, for which the frequencies are the usual ones.
        gradual: Whether frequencies change a little with each further token. Otherwise there are two sets of them.
    """

    rope_type: str
    length: int
    gradual: bool

    @classmethod
    def of(cls, config: Any) -> "SwitchingRotary | None":
        """Read a transformers config. Returns None if the frequencies are always the same."""
        rope = _rope_parameters(config)
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ("dynamic", "longrope"):
            return None
        return cls(rope_type, _original_length(config, rope), gradual=rope_type == "dynamic")


def longest_sequence(config: Any) -> int:
    """Return the number of positions for which a model's positions are made.

    YaRN, linear and dynamic scaling reach beyond `max_position_embeddings` in most configs: that is the length before
    scaling. A config that holds the scaled length already names the original one beside it.
    """
    rope = _rope_parameters(config)
    positions, rope_type = int(config.max_position_embeddings), rope.get("rope_type", "default")
    if rope_type not in ("yarn", "linear", "dynamic", "longrope"):
        return positions
    return max(positions, int(float(rope.get("factor") or 1.0) * _original_length(config, rope)))


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the rotary embedding's parameters; of a config with some per kind of layer, those that are scaled."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_kind = [each for each in rope.values() if isinstance(each, dict)]
    scaled = [each for each in by_kind if each.get("rope_type", "default") != "default"]
    return next(iter(scaled or by_kind), rope)


def _original_length(config: Any, rope: dict[str, Any]) -> int:
    """Return the length of the sequences that the model was trained on before scaling."""
    own = getattr(config, "original_max_position_embeddings", None)
    return int(rope.get("original_max_position_embeddings") or own or config.max_position_embeddings)


class Rotation:
    """The rotary embedding of a model; the identity for a model without one, such as GPT-2.

    The embedding rotates each element of a head's first half together with the same element of the second half, as
    Llama, Qwen and Mistral do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.base_model
        self.embedding = getattr(base, "rotary_emb", None)
        self.device = input_device(model)

    def cos_sin(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines of positions.

        Args:
            position: Integers `[positions]`.

        Returns:
            Cosines and sines, float32 `[positions, head_dim]` each. None if the model has no rotary embedding.
        """
        if self.embedding is None:
            return None
        like = torch.zeros(1, device=self.device)
        cos, sin = self.embedding(like, position[None].to(self.device))
        return cos[0].float(), sin[0].float()

    def unrotate(self, rotated: Tensor, position: Tensor) -> Tensor:
        """Undo the rotary embedding.

        Args:
            rotated: Queries or keys after the embedding, `[..., positions, head_dim]`.
            position: Their positions, `[positions]`.

        Returns:
            The queries or keys before the embedding, float32 of the same shape.
        """
        cos_sin = self.cos_sin(position)
        if cos_sin is None:
            return rotated.float()
        cos, sin = cos_sin
        # Some embeddings (YaRN) scale by a factor s too: then cos² + sin² is s², and not 1.
        return (rotated.float() * cos - _rotate_half(rotated.float()) * sin) / (cos.square() + sin.square())

    def mean_matrix(self, position: Tensor, head_dim: int) -> Tensor:
        """Return the mean over positions of the matrix R in `rotated = R @ vector`.

        Args:
            position: Positions to average over, `[positions]`.
            head_dim: Dimensions of a head.

        Returns:
            The matrix, float32 `[head_dim, head_dim]`.
        """
        cos_sin = self.cos_sin(position)
        identity = torch.eye(head_dim, device=self.device)
        if cos_sin is None:
            return identity
        cos, sin = (values.mean(dim=0)[:, None] for values in cos_sin)
        return cos * identity + sin * _rotate_half(identity.T).T


def _rotate_half(vector: Tensor) -> Tensor:
    """Map the halves `(x, y)` of the last axis to `(−y, x)`."""
    x, y = vector.chunk(2, dim=-1)
    return torch.cat([-y, x], dim=-1)
