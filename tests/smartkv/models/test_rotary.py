"""A model's rotary embedding undone, and its mean over positions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from smartkv.errors import SmartKVError
from smartkv.models.key_hooks import read_keys
from smartkv.models.observation import observe_attention
from smartkv.models.rotary import Rotation, SwitchingRotary, longest_sequence
from tests.families import make
from tests.models import gpt2, llama, token_ids

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


class RotatedKeys:
    """Observer that keeps each layer's keys after the rotary embedding."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []

    def on_keys(self, layer: int, keys: Tensor) -> None: ...

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        self.keys.append(keys)

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None: ...


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "mistral", "yarn", "cohere", "glm", "phi", "olmo3, sliding", "gpt_oss, sliding"],
)
def test_a_rotary_embedding_is_taken_back(family: str) -> None:
    """YaRN scales what it rotates, too."""
    model = llama(rope_parameters=YARN) if family == "yarn" else make(family)
    ids, rotated = token_ids(20), RotatedKeys()
    before = read_keys(model, ids)
    with torch.inference_mode(), observe_attention(model, rotated):
        model(input_ids=ids[None], use_cache=False)
    for layer, (keys, key) in enumerate(zip(before, rotated.keys, strict=True)):
        assert not torch.allclose(key, keys[0], atol=1e-2)
        plain = Rotation(model).of_layer(layer).unrotate(key, torch.arange(20))
        torch.testing.assert_close(plain, keys[0], atol=1e-5, rtol=1e-4)


def test_the_mean_rotation_is_the_mean_of_rotations() -> None:
    model, vector, position = llama(), torch.randn(8), torch.arange(5, 25)
    cos, sin = model.base_model.rotary_emb(torch.zeros(1), position[None])
    turned, _ = apply_rotary_pos_emb(vector.expand(1, 1, 20, 8), vector.expand(1, 1, 20, 8), cos, sin)
    matrix = Rotation(model).mean_matrix(position, 8)
    torch.testing.assert_close(matrix @ vector, turned[0, 0].mean(dim=0), atol=1e-5, rtol=1e-4)


def test_the_mean_rotation_of_a_part_leaves_the_rest() -> None:
    model, vectors, position = make("glm"), torch.randn(20, 8), torch.arange(5, 25)
    rotation = Rotation(model)
    matrix = rotation.mean_matrix(position, 8)
    want = rotation.rotate(vectors[:1].expand(20, 8), position).mean(dim=0)
    torch.testing.assert_close(matrix @ vectors[0], want, atol=1e-5, rtol=1e-4)
    assert torch.equal(matrix[4:], torch.eye(8)[4:])


def test_a_rotation_before_a_norm_cannot_be_taken_back() -> None:
    with pytest.raises(SmartKVError, match="rotary embedding of a hunyuan_v1_dense cannot be undone"):
        Rotation(make("hunyuan_v1_dense")).unrotate(torch.zeros(1, 4, 8), torch.arange(4))


def test_a_model_without_a_rotary_embedding_has_the_identity() -> None:
    rotation, keys = Rotation(gpt2()), torch.randn(2, 5, 8).bfloat16()
    assert rotation.cos_sin(torch.arange(5)) is None
    assert torch.equal(rotation.unrotate(keys, torch.arange(5)), keys.float())
    assert torch.equal(rotation.mean_matrix(torch.arange(5), 8), torch.eye(8))


@pytest.mark.parametrize(
    ("rope", "positions", "switch"),
    [
        ({"rope_type": "default"}, 32, None),
        ({"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8}, 32, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 32, None),
        ({"rope_type": "yarn", "factor": 4.0}, 128, None),
        ({"rope_type": "linear", "factor": 2.0}, 64, None),
        ({"rope_type": "dynamic", "factor": 2.0}, 64, SwitchingRotary("dynamic", 32, gradual=True)),
        (
            {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 8},
            32,
            SwitchingRotary("longrope", 8, gradual=False),
        ),
    ],
    ids=lambda value: value.get("rope_type") if isinstance(value, dict) else None,
)
def test_a_config_says_how_far_positions_reach(rope: dict[str, Any], positions: int, switch: Any) -> None:
    for name in ("rope_parameters", "rope_scaling"):
        config = SimpleNamespace(max_position_embeddings=32, **{name: rope})
        assert longest_sequence(config) == positions and SwitchingRotary.of(config) == switch


def test_a_config_with_a_rotary_embedding_per_kind_of_layer_is_read() -> None:
    kinds = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}}
    assert longest_sequence(SimpleNamespace(max_position_embeddings=32, rope_parameters=kinds)) == 256
    assert longest_sequence(SimpleNamespace(max_position_embeddings=32)) == 32
