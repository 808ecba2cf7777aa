"""Labels as a GPU computes them, on the CPU: all queries at once, no search for columns, one wait for a window."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.labels import lifespans
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models import observation
from tests.kernels import a_layer
from tests.models import FAMILIES, llama, token_ids
from tests.smartkv.labels.test_lifespans import THRESHOLDS, TOKENS, by_family, in_tiles, quick, random_attention


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All queries in one tile, and no search for the columns that are hit."""
    monkeypatch.setattr(lifespans, "_columns_pay", lambda device: False)
    monkeypatch.setattr(observation, "tile_queries", lambda heads, tokens, device: tokens)


@quick
@given(st.integers(1, 40), st.integers(0, 10**6), st.lists(st.integers(1, 17), min_size=1, max_size=4))
def test_a_search_of_all_keys_finds_what_a_search_of_columns_finds(tokens: int, seed: int, sizes: list[int]) -> None:
    attention, spec = random_attention(tokens, seed), LabelSpec(THRESHOLDS)
    want = in_tiles(attention, spec, sizes).lifespan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lifespans, "_columns_pay", lambda device: False)
        assert torch.equal(in_tiles(attention, spec, sizes).lifespan, want)


@by_family
def test_one_tile_gives_the_labels_of_many(family: str, request: pytest.FixtureRequest) -> None:
    model, ids, spec = FAMILIES[family](), token_ids(TOKENS), LabelSpec(THRESHOLDS, (1, 8), 16)
    want = label_window(model, ids, spec)
    request.getfixturevalue("as_on_a_gpu")
    got = label_window(model, ids, spec)
    assert torch.equal(got.keys, want.keys) and torch.equal(got.lifespan, want.lifespan)
    torch.testing.assert_close(got.future_attention, want.future_attention, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_starts_few_kernels_and_is_not_waited_for() -> None:
    """With three thresholds and an age; a forward pass alone starts 33."""

    def harvest(model: PreTrainedModel) -> Callable[[], object]:
        return lambda: label_window(model, token_ids(300), LabelSpec((0.02, 0.05, 0.11), (16,), 100))

    kernels = a_layer(lambda layers: llama(num_hidden_layers=layers, max_position_embeddings=512), harvest)
    assert not kernels.waited
    assert kernels.started.total() <= 33 + 70


# -- what is not finite -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "part", "size", "said"),
    [
        (1, "v_proj", math.nan, "layer 1 gave attention that is NaN or infinite"),
        (0, "k_proj", math.nan, "layer 0 gave keys that are NaN"),
        (1, "k_proj", 1e9, "layer 1 gave keys that are NaN, infinite or beyond float16"),
    ],
)
def test_what_is_not_finite_is_named_with_the_first_layer(layer: int, part: str, size: float, said: str) -> None:
    model = llama()
    getattr(model.model.layers[layer].self_attn, part).weight.data.fill_(size)
    with pytest.raises(SmartKVError, match=f"{said}.*check the model's weights and dtype"):
        label_window(model, token_ids(20), LabelSpec())
