"""A model's rotary embedding (RoPE, Su et al. 2021): undo it, or average it over positions."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.models.wrappers import input_device


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
