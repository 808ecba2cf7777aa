"""Observed attention against the models' own eager attention."""

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.models import observation
from smartkv.models.architecture import attention_modules
from smartkv.models.observation import FiniteChecks, attention_tiles, observe_attention, on_cpu, tile_queries
from smartkv.models.softmax import Softmax
from tests.models import FAMILIES, llama, qwen2, token_ids

TOKENS = 41  # three tiles of 16 queries, the last cut short
by_family = pytest.mark.parametrize("family", FAMILIES)


class Recorder:
    """Observer that keeps copies of all it receives."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.rotated: dict[int, Tensor] = {}
        self.tiles: dict[int, list[tuple[int, Tensor]]] = defaultdict(list)

    def on_keys(self, layer: int, keys: Tensor) -> None:
        self.keys[layer] = keys.clone()

    def on_rotated_keys(self, layer: int, keys: Tensor) -> None:
        self.rotated[layer] = keys.clone()

    def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
        self.tiles[layer].append((first_query, probabilities.clone()))

    def probabilities(self, layer: int) -> Tensor:
        """All tiles of one layer, `[query_heads, queries, keys]`."""
        tokens = sum(tile.shape[2] for _, tile in self.tiles[layer])
        padded = [F.pad(tile, (0, tokens - tile.shape[3])) for _, tile in self.tiles[layer]]
        return torch.cat(padded, dim=2).flatten(0, 1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 queries, so that a short sequence has several."""
    monkeypatch.setattr(observation, "TILE_ELEMENTS", 1)


@torch.no_grad()
def observed(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Recorder]:
    """Logits `[tokens, vocabulary]` and what the observer saw."""
    recorder = Recorder()
    with observe_attention(model, recorder):
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits, recorder


@torch.no_grad()
def eager(model: PreTrainedModel, ids: Tensor) -> Any:
    """The model's own output with `attentions` and `hidden_states`."""
    model.set_attn_implementation("eager")
    return model(input_ids=ids[None], use_cache=False, output_attentions=True, output_hidden_states=True)


def keys_by_hand(model: PreTrainedModel, layer: int, hidden: Tensor) -> Tensor:
    """Pre-RoPE keys `[kv_heads, tokens, head_dim]` from a layer's input `[tokens, hidden]`, weight by weight."""
    attention = attention_modules(model)[layer]
    if model.config.model_type == "gpt2":
        width = hidden.shape[-1]
        normed = model.transformer.h[layer].ln_1(hidden)
        fused = attention.c_attn
        flat = normed @ fused.weight[:, width : 2 * width] + fused.bias[width : 2 * width]
    else:
        normed = model.model.layers[layer].input_layernorm(hidden)
        flat = F.linear(normed, attention.k_proj.weight, attention.k_proj.bias)
    heads = flat.view(len(hidden), -1, attention.head_dim)
    if model.config.model_type == "qwen3":
        scale = heads.square().mean(dim=-1, keepdim=True).add(model.config.rms_norm_eps).rsqrt()
        heads = heads * scale * attention.k_norm.weight
    return heads.transpose(0, 1)


def rotate_by_hand(model: PreTrainedModel, keys: Tensor) -> Tensor:
    """`keys` `[kv_heads, tokens, head_dim]` turned by the model's own angles."""
    cos, sin = model.model.rotary_emb(keys, torch.arange(keys.shape[1])[None])
    first, second = keys.chunk(2, dim=-1)
    return keys * cos[0] + torch.cat([-second, first], dim=-1) * sin[0]


@by_family
def test_observing_leaves_the_logits_as_eager_attention_gives_them(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(TOKENS)
    logits, _ = observed(model, ids)
    torch.testing.assert_close(logits, eager(model, ids).logits[0], atol=1e-5, rtol=0)


@by_family
def test_probabilities_are_those_of_eager_attention_in_each_layer(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(TOKENS)
    _, recorder = observed(model, ids)
    for layer, expected in enumerate(eager(model, ids).attentions):
        torch.testing.assert_close(recorder.probabilities(layer), expected[0], atol=1e-5, rtol=0)


@by_family
def test_pre_rope_keys_are_what_the_weights_make_of_the_layers_input(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(TOKENS)
    _, recorder = observed(model, ids)
    hidden = eager(model, ids).hidden_states
    assert sorted(recorder.keys) == [0, 1]
    for layer, keys in recorder.keys.items():
        torch.testing.assert_close(keys, keys_by_hand(model, layer, hidden[layer][0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_rotating_the_pre_rope_keys_gives_the_keys_that_attention_uses(family: str) -> None:
    model = FAMILIES[family]()
    _, recorder = observed(model, token_ids(TOKENS))
    for layer, keys in recorder.keys.items():
        torch.testing.assert_close(rotate_by_hand(model, keys), recorder.rotated[layer], atol=1e-5, rtol=0)
        assert not torch.allclose(keys[:, 1:], recorder.rotated[layer][:, 1:], atol=1e-2)


def test_without_a_rotary_embedding_both_keys_are_the_same() -> None:
    _, recorder = observed(FAMILIES["gpt2"](), token_ids(TOKENS))
    assert all(torch.equal(keys, recorder.rotated[layer]) for layer, keys in recorder.keys.items())


def test_gpt2s_scaling_by_layer_is_respected() -> None:
    model, ids = FAMILIES["gpt2"](scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False), token_ids(TOKENS)
    _, recorder = observed(model, ids)
    for layer, expected in enumerate(eager(model, ids).attentions):
        torch.testing.assert_close(recorder.probabilities(layer), expected[0], atol=1e-5, rtol=0)


def test_a_sliding_window_hides_all_but_the_last_8_keys() -> None:
    _, recorder = observed(FAMILIES["mistral_sliding"](), token_ids(TOKENS))
    age = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None, :]
    seen = (age >= 0) & (age < 8)
    for layer in recorder.keys:
        probabilities = recorder.probabilities(layer)
        assert (probabilities[:, seen] > 0).all()
        assert (probabilities[:, ~seen] == 0).all()


def test_a_sliding_window_of_some_layers_leaves_the_others_whole() -> None:
    model = qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    ids = token_ids(TOKENS)
    _, recorder = observed(model, ids)
    assert recorder.probabilities(0)[:, -1, 0].min() > 0
    assert recorder.probabilities(1)[:, -1, 0].max() == 0
    for layer, expected in enumerate(eager(model, ids).attentions):
        torch.testing.assert_close(recorder.probabilities(layer), expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("elements", [1, 4 * TOKENS * 20, 2**22])
def test_the_size_of_tiles_changes_no_probability(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), token_ids(TOKENS)
    monkeypatch.setattr(observation, "TILE_ELEMENTS", elements)
    _, recorder = observed(model, ids)
    assert len(recorder.tiles[0]) == {1: 3, 4 * TOKENS * 20: 3, 2**22: 1}[elements]
    for layer, expected in enumerate(eager(model, ids).attentions):
        torch.testing.assert_close(recorder.probabilities(layer), expected[0], atol=1e-5, rtol=0)


def test_the_models_value_dtype_is_kept() -> None:
    logits, recorder = observed(llama().to(torch.bfloat16), token_ids(TOKENS))
    assert logits.dtype == torch.bfloat16
    assert {keys.dtype for keys in recorder.keys.values()} == {torch.bfloat16}
    assert {tile.dtype for _, tile in recorder.tiles[0]} == {torch.float32}


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_probabilities_are_as_exact_as_the_scores_dtype(dtype: torch.dtype, off: float) -> None:
    """With a scaling that is no power of two, applied inside the product."""
    torch.manual_seed(0)
    query, key, scaling = torch.randn(4, 40, 128).to(dtype), torch.randn(2, 40, 128).to(dtype), 128**-0.5
    scores = torch.einsum("kgqd,knd->kgqn", query.double().unflatten(0, (2, 2)), key.double()) * scaling
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    expected = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    for start, tile in attention_tiles(query, key, Softmax(scaling)):
        stop = start + tile.shape[2]
        torch.testing.assert_close(tile.double(), expected[:, :, start:stop, :stop], atol=off, rtol=0)
    assert stop == 40


@pytest.mark.parametrize("tokens", [40, 700, 1500])
def test_a_block_never_holds_more_probabilities_than_allowed(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = 2**17
    monkeypatch.setattr(observation, "TILE_ELEMENTS", allowed)
    query, key = torch.randn(4, tokens, 8), torch.randn(2, tokens, 8)
    for _, tile in attention_tiles(query, key, Softmax(1.0)):
        assert tile.numel() <= max(allowed, 16 * 4 * tokens)
        assert tile.shape[2] <= 128


def test_tiles_go_through_each_query_once_and_end_at_its_key() -> None:
    _, recorder = observed(llama(), token_ids(TOKENS))
    for tiles in recorder.tiles.values():
        expected = 0
        for first, tile in tiles:
            assert first == expected
            expected += tile.shape[2]
            assert tile.shape == (2, 2, tile.shape[2], expected)
        assert expected == TOKENS


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All that observing could leave behind."""
    return {
        "implementation": model.config._attn_implementation,
        "hooks": [name for name, module in model.named_modules() if module._forward_hooks],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@by_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_as_it_was_on_leaving(family: str, implementation: str) -> None:
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    before = state(model)
    with observe_attention(model, Recorder()):
        assert state(model) != before
    assert state(model) == before
    assert before["hooks"] == []


@by_family
def test_the_model_is_as_it_was_after_an_exception(family: str) -> None:
    class Failing(Recorder):
        def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None:
            raise KeyError("in the middle of layer 0")

    model, ids = FAMILIES[family](), token_ids(TOKENS)
    before, logits = state(model), model(ids[None]).logits
    with pytest.raises(KeyError, match="in the middle"), observe_attention(model, Failing()):
        model(ids[None])
    assert state(model) == before
    assert torch.equal(model(ids[None]).logits, logits)


def test_after_observing_the_observer_hears_no_more() -> None:
    model, ids = llama(), token_ids(TOKENS)
    _, recorder = observed(model, ids)
    tiles = len(recorder.tiles[0])
    model(ids[None])
    assert len(recorder.tiles[0]) == tiles


@by_family
def test_a_batch_of_two_is_refused(family: str) -> None:
    model: nn.Module = FAMILIES[family]()
    with pytest.raises(ValueError, match=r"one sequence.*got 2"), observe_attention(model, Recorder()):
        model(token_ids(8)[None].expand(2, -1))


def test_observers_of_another_kind_can_look_too() -> None:
    """The protocol is all that `observe_attention` asks for."""
    seen: list[int] = []

    class Looker:
        def on_keys(self, layer: int, keys: Tensor) -> None:
            seen.append(layer)

        def on_rotated_keys(self, layer: int, keys: Tensor) -> None: ...

        def on_tile(self, layer: int, first_query: int, probabilities: Tensor) -> None: ...

    model = llama()
    with torch.no_grad(), observe_attention(model, Looker()):
        model(token_ids(8)[None], use_cache=False)
    assert seen == [0, 1]


def test_the_default_dtype_is_float32_inside_and_restored_after_an_error() -> None:
    model, before = llama(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ZeroDivisionError), observe_attention(model, Recorder()):
            assert torch.get_default_dtype() == torch.float32 and not torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(before)


def test_a_gpu_takes_as_many_queries_at_once_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert tile_queries(9, 2048, gpu) == 2048
    assert tile_queries(32, 32_768, gpu) == 256
    assert tile_queries(64, 131_072, gpu) == 128
    monkeypatch.undo()
    assert tile_queries(9, 2048, torch.device("cpu")) == 128


def test_checks_name_the_first_fault_and_forget() -> None:
    checks = FiniteChecks()
    checks.check()
    for fault, value in (("a is bad", 1.0), ("b is bad", math.inf), ("c is bad", math.nan)):
        checks.add(fault, torch.tensor([0.0, value]).to(torch.bfloat16))
    with pytest.raises(SmartKVError, match="b is bad: check the model's weights"):
        checks.check()
    checks.check()


def test_further_checks_are_made_on_leaving() -> None:
    model = llama()
    with pytest.raises(SmartKVError, match="mine is bad"), observe_attention(model, Recorder()) as checks:
        checks.add("mine is bad", torch.tensor([math.nan]))


def test_an_error_inside_is_not_hidden_by_what_was_noted() -> None:
    with pytest.raises(ZeroDivisionError), observe_attention(llama(), Recorder()) as checks:
        checks.add("mine is bad", torch.tensor([math.nan]))
        raise ZeroDivisionError


def test_tensors_are_stacked_along_the_dimension_that_was_asked_for() -> None:
    assert on_cpu([torch.ones(2), 2 * torch.ones(2)], dim=1).tolist() == [[1, 2], [1, 2]]
