"""A model's rotary embedding (RoPE, Su et al. 2021): undo it, or average it over positions."""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.models.key_sites import KEY_SITES
from smartkv.models.wrappers import attention_blocks, input_device, language_model, self_attention


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
    """The rotary embedding of one layer of a model; the identity for a layer without one.

    Which elements turn together, and how many of them, differs between families. So the family's own function rotates.

    Args:
        model: A model of a supported family, or a wrapper of one.
        layer: Index of the layer.
    """

    def __init__(self, model: PreTrainedModel, layer: int = 0) -> None:
        self.model, self.lm = model, language_model(model)
        config, attention = self.lm.config, self_attention(attention_blocks(self.lm)[layer])
        site, base = KEY_SITES[config.model_type], self.lm.base_model
        self.embedding: Any = base.rotary_emb if site.rotary(attention) else None
        self.normed_after, self.half_angles = site.norm_after is not None, site.half_angles
        self.device = input_device(model)
        rope = getattr(config, "rope_parameters", None) or {}
        by_kind = any(isinstance(value, dict) for value in rope.values())
        self.kind = (
            (config.layer_types[attention.layer_idx],) if by_kind else ()
        )  # then each kind of layer has its own angles
        if self.embedding is not None:
            self.apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb

    def of_layer(self, layer: int) -> "Rotation":
        """Return the rotary embedding of another layer of the same model."""
        return Rotation(self.model, layer)

    def cos_sin(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the cosines and sines of positions, as the model's embedding gives them.

        Args:
            position: Integers `[positions]`.

        Returns:
            Cosines and sines, float32 `[positions, rotated]` each, `rotated` the number of elements of a head that
            turn. None if the layer has no rotary embedding.
        """
        if self.embedding is None:
            return None
        like = torch.zeros(1, device=self.device)
        row = position[None].to(self.device)
        if hasattr(self.embedding, "mrope_section"):  # Qwen3.5: also the height and width of pictures, of which text
            row = row.expand(3, 1, -1)  # has none; older transformers do not expand it by themselves
        cos, sin = (each[0].float() for each in self.embedding(like, row, *self.kind))
        return (torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)) if self.half_angles else (cos, sin)

    def rotate(self, vector: Tensor, position: Tensor) -> Tensor:
        """Apply the rotary embedding.

        Args:
            vector: Queries or keys before the embedding, `[..., positions, head_dim]`.
            position: Their positions, `[positions]`.

        Returns:
            The queries or keys after the embedding, float32 of the same shape.
        """
        cos_sin = self.cos_sin(position)
        return vector.float() if cos_sin is None else self._turn(vector.float(), *cos_sin)

    def unrotate(self, rotated: Tensor, position: Tensor) -> Tensor:
        """Undo the rotary embedding.

        Args:
            rotated: Queries or keys after the embedding, `[..., positions, head_dim]`.
            position: Their positions, `[positions]`.

        Returns:
            The queries or keys before the embedding, float32 of the same shape.

        Raises:
            SmartKVError: The model normalises queries and keys after the embedding.
        """
        if self.normed_after:
            raise SmartKVError(
                f"the rotary embedding of a {self.lm.config.model_type} cannot be undone, because it normalises "
                "queries and keys afterwards: choose a method that needs no queries before the embedding"
            )
        cos_sin = self.cos_sin(position)
        if cos_sin is None:
            return rotated.float()
        cos, sin = cos_sin
        turned, width = self._turn(rotated.float(), cos, -sin), cos.shape[-1]
        # Some embeddings (YaRN) scale by a factor s too: then cos² + sin² is s², and not 1.
        return torch.cat([turned[..., :width] / (cos.square() + sin.square()), turned[..., width:]], dim=-1)

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
        cos, sin = (values.mean(dim=0).expand(head_dim, -1) for values in cos_sin)
        return self._turn(identity, cos, sin).T

    def _turn(self, vector: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate `[..., positions, head_dim]` by `[positions, rotated]`; what lies beyond `rotated` stays."""
        width = cos.shape[-1]
        turning = vector[..., :width].reshape(1, -1, len(cos), width)  # [batch, heads, positions, rotated]
        if self.half_angles:
            cos, sin = cos[..., : width // 2], sin[..., : width // 2]
        turned, _ = self.apply(turning, turning, cos[None], sin[None])
        return torch.cat([turned.reshape(vector[..., :width].shape), vector[..., width:]], dim=-1)
