"""A model's rotary embedding, as matrices: to take it back from queries, and to put on what is to come."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Rotation:
    """Of a model with a rotary embedding in halves (Llama, Qwen, Mistral), or of one without (GPT-2): the identity."""

    def __init__(self, model: PreTrainedModel) -> None:
        base: Any = model.base_model
        self.embedding = getattr(base, "rotary_emb", None)
        self.device = model.device

    def cos_sin(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """float32 `[positions, head_dim]` each; None: the model has no rotary embedding."""
        if self.embedding is None:
            return None
        like = torch.zeros(1, device=self.device)
        cos, sin = self.embedding(like, position[None].to(self.device))
        return cos[0].float(), sin[0].float()

    def unrotate(self, rotated: Tensor, position: Tensor) -> Tensor:
        """float32: queries or keys `[…, positions, head_dim]` as they were before the rotary embedding."""
        found = self.cos_sin(position)
        if found is None:
            return rotated.float()
        cos, sin = found  # of attention scaling s: cos² + sin² = s²
        return (rotated.float() * cos - _rotate_half(rotated.float()) * sin) / (cos.square() + sin.square())

    def mean_matrix(self, position: Tensor, head_dim: int) -> Tensor:
        """Mean over positions of the matrix R with `rotated = R @ vector`, float32 `[head_dim, head_dim]`."""
        found = self.cos_sin(position)
        identity = torch.eye(head_dim, device=self.device)
        if found is None:
            return identity
        cos, sin = (part.mean(dim=0)[:, None] for part in found)
        return cos * identity + sin * _rotate_half(identity.T).T


def _rotate_half(vector: Tensor) -> Tensor:
    """`(x, y)` in halves -> `(−y, x)`."""
    x, y = vector.chunk(2, dim=-1)
    return torch.cat([-y, x], dim=-1)
