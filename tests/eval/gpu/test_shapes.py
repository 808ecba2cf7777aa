"""Random models and caches that are filled without a prompt."""

import pytest
import torch

from eval.gpu.shapes import SHAPES, TINY, build, evicting_cache, full_cache, keys_bytes, ragged_store, random_gates
from smartkv.models.architecture import Architecture

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TINY)
def test_a_model_has_the_shape_that_was_asked_for(name: str) -> None:
    shape = TINY[name]
    model = build(shape, CPU, torch.float32, 300)
    architecture = Architecture.of(model.config)
    assert architecture.model_type == shape.family and architecture.max_positions == 300
    assert (architecture.layers, architecture.kv_heads, architecture.head_dim) == (2, 2, 8)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == shape.tied


def test_the_shapes_are_those_of_the_models() -> None:
    heads = {name: (shape.layers, shape.heads, shape.kv_heads, shape.head_dim) for name, shape in SHAPES.items()}
    assert heads["SmolLM2-135M"] == (30, 9, 3, 64)
    assert heads["Qwen2.5-0.5B"] == (24, 14, 2, 64)
    assert heads["Llama-3.1-8B"] == (32, 32, 8, 128)


def test_a_store_holds_the_mean_that_was_asked_for_unevenly_and_in_order() -> None:
    store = ragged_store(64, 100, 400, 8, CPU, torch.float32)
    assert 90 < float(store.counts.float().mean()) < 110
    assert int(store.counts.min()) < 70 and int(store.counts.max()) > 130
    for keys in store.by_pair():
        place = keys.position
        assert (place.diff() > 0).all() and int(place.min()) >= 0 and int(place.max()) < 400


def test_filled_caches_go_on_like_read_ones() -> None:
    model = build(TINY["tiny Llama"], CPU, torch.float32, 300)
    place = torch.full((2, 1), 128)
    with torch.no_grad():
        for way in ("SmartKV", "SmartKV, budget", "static", "dynamic"):
            if way.startswith("SmartKV"):
                cache = evicting_cache(model, random_gates(model), 2, 128, 0.25, "budget" in way)
                assert 0.2 < float(cache.live_keys.float().mean()) / 128 < 0.3
            else:
                cache = full_cache(model, way, 2, 128, 140)
            logits = model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache, position_ids=place).logits
            assert logits.isfinite().all() and cache.get_seq_length() == 129


def test_the_bytes_of_a_full_cache() -> None:
    model = build(TINY["tiny Llama"], CPU, torch.float32, 300)
    cache = full_cache(model, "dynamic", 3, 10, 0)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert keys_bytes(model, 3, 10) == held


def test_a_budget_is_held_by_what_comes() -> None:
    model = build(TINY["tiny Llama"], CPU, torch.float32, 600)
    cache = evicting_cache(model, random_gates(model), 2, 128, 0.25, budget=True)
    before = float(cache.live_keys.float().mean())
    with torch.no_grad():
        for place in range(128, 258):
            model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache, position_ids=torch.full((2, 1), place))
    assert before == pytest.approx(32, abs=8) and float(cache.live_keys.float().mean()) == pytest.approx(32, abs=3)
