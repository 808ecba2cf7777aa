"""Labels against plain loops over whole attention matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from smartkv.errors import SmartKVError
from smartkv.labels.lifespans import LabelSpec, LayerLabels, check_window, label_window, log4_lifespan
from smartkv.models import observation
from tests.models import FAMILIES, gpt2, llama, token_ids

TOKENS = 41
THRESHOLDS = (0.02, 0.3, 0.1)  # in no order
by_family = pytest.mark.parametrize("family", FAMILIES)
quick = settings(deadline=None, max_examples=25, derandomize=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 queries, so that a short window has several."""
    monkeypatch.setattr(observation, "TILE_ELEMENTS", 1)


def random_attention(tokens: int, seed: int, kv_heads: int = 2, group: int = 3) -> Tensor:
    """Causal attention, uneven, `[kv_heads, group, queries, keys]`."""
    scores = 3 * torch.randn(kv_heads, group, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


def naive_lifespan(attention: Tensor, thresholds: tuple[float, ...]) -> list[list[list[int]]]:
    """`[thresholds][kv_heads][tokens]` by the definition."""
    heads, tokens = attention.tolist(), attention.shape[-1]
    answer = []
    for threshold in thresholds:
        answer.append([])
        for head in heads:
            answer[-1].append([])
            for key in range(tokens):
                lifespan = 1
                for query in range(key, tokens):
                    if max(one[query][key] for one in head) > threshold:
                        lifespan = query - key + 1
                answer[-1][-1].append(lifespan)
    return answer


def naive_future(attention: Tensor, ages: tuple[int, ...], follow_up: int) -> list[list[list[float]]]:
    """`[ages][kv_heads][tokens]` by the definition, NaN where not all queries were seen."""
    heads, tokens = attention.tolist(), attention.shape[-1]
    answer = []
    for age in ages:
        answer.append([])
        for head in heads:
            answer[-1].append([])
            for key in range(tokens):
                queries = range(key + age, key + age + follow_up)
                if queries[-1] >= tokens:
                    answer[-1][-1].append(math.nan)
                else:
                    strongest = [max(one[query][key] for one in head) for query in queries]
                    answer[-1][-1].append(sum(strongest) / follow_up)
    return answer


def in_tiles(attention: Tensor, spec: LabelSpec, sizes: list[int]) -> LayerLabels:
    """Labels of `attention`, fed in tiles of these sizes (the last one goes on)."""
    kv_heads, _, tokens, _ = attention.shape
    labels = LayerLabels(spec, kv_heads, tokens, torch.device("cpu"))
    start, turn = 0, 0
    while start < tokens:
        stop = min(tokens, start + sizes[min(turn, len(sizes) - 1)])
        labels.update(start, attention[:, :, start:stop, :stop])
        start, turn = stop, turn + 1
    return labels


def same(labels: Tensor, naive: list) -> None:
    torch.testing.assert_close(labels.double(), torch.tensor(naive).double(), atol=1e-6, rtol=0, equal_nan=True)


windows = st.integers(1, 24)
seeds = st.integers(0, 10**6)
tile_sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)
spans = st.integers(1, 27)


@quick
@given(tokens=windows, seed=seeds, sizes=tile_sizes)
def test_lifespans_are_those_of_a_plain_loop(tokens: int, seed: int, sizes: list[int]) -> None:
    attention = random_attention(tokens, seed)
    same(in_tiles(attention, LabelSpec(THRESHOLDS), sizes).lifespan, naive_lifespan(attention, THRESHOLDS))


@quick
@given(tokens=windows, seed=seeds, sizes=tile_sizes, follow_up=spans, ages=st.lists(spans, min_size=1, max_size=3))
def test_future_attention_is_that_of_a_plain_loop(
    tokens: int, seed: int, sizes: list[int], follow_up: int, ages: list[int]
) -> None:
    attention = random_attention(tokens, seed)
    labels = in_tiles(attention, LabelSpec((0.05,), tuple(ages), follow_up), sizes)
    same(labels.future_attention(), naive_future(attention, tuple(ages), follow_up))


@pytest.mark.parametrize("follow_up", [3, 16, 20], ids=["below a tile", "a tile", "above a tile"])
@pytest.mark.parametrize("age", [1, 5, 17, 40])
def test_future_attention_of_a_follow_up_around_the_block(follow_up: int, age: int) -> None:
    attention = random_attention(TOKENS, 0)
    labels = in_tiles(attention, LabelSpec((0.05,), (age,), follow_up), [16])
    same(labels.future_attention(), naive_future(attention, (age,), follow_up))


@quick
@given(tokens=windows, seed=seeds, sizes=tile_sizes, age=spans, follow_up=spans)
def test_cutting_the_queries_into_tiles_changes_nothing(
    tokens: int, seed: int, sizes: list[int], age: int, follow_up: int
) -> None:
    attention, spec = random_attention(tokens, seed), LabelSpec(THRESHOLDS, (age,), follow_up)
    cut, whole = in_tiles(attention, spec, sizes), in_tiles(attention, spec, [tokens])
    assert torch.equal(cut.lifespan, whole.lifespan)
    torch.testing.assert_close(cut.future_attention(), whole.future_attention(), atol=1e-6, rtol=0, equal_nan=True)


@quick
@given(tokens=windows, seed=seeds, sizes=tile_sizes)
def test_a_lifespan_is_at_least_1_and_ends_in_the_window(tokens: int, seed: int, sizes: list[int]) -> None:
    lifespan = in_tiles(random_attention(tokens, seed), LabelSpec(THRESHOLDS), sizes).lifespan
    assert (lifespan >= 1).all()
    assert (lifespan <= tokens - torch.arange(tokens)).all()


@quick
@given(tokens=windows, seed=seeds, thresholds=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=4))
def test_a_higher_threshold_never_lengthens_a_lifespan(tokens: int, seed: int, thresholds: list[float]) -> None:
    spec = LabelSpec(tuple(sorted(thresholds)))
    assert (in_tiles(random_attention(tokens, seed), spec, [5]).lifespan.diff(dim=0) <= 0).all()


@quick
@given(seed=seeds)
def test_a_threshold_is_labelled_the_same_alone_and_with_others(seed: int) -> None:
    attention = random_attention(20, seed)
    together = in_tiles(attention, LabelSpec(THRESHOLDS), [7]).lifespan
    for row, threshold in zip(together, THRESHOLDS, strict=True):
        assert torch.equal(row, in_tiles(attention, LabelSpec((threshold,)), [7]).lifespan[0])


def test_a_key_that_nobody_hits_lives_1_token_and_its_last_hit_counts() -> None:
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, 1, 4, 1] = 0.2  # one query head of the group is enough
    attention[0, 0, 2, 1] = 0.9
    assert in_tiles(attention, LabelSpec((0.1,)), [2]).lifespan[0, 0].tolist() == [1, 4, 1, 1, 1, 1]


def test_a_probability_equal_to_the_threshold_is_no_hit() -> None:
    attention = torch.zeros(1, 1, 4, 4)
    attention[0, 0, 3, 0] = 0.25
    assert in_tiles(attention, LabelSpec((0.25, 0.2)), [4]).lifespan[:, 0, 0].tolist() == [1, 4]


def eager_attention(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Each layer's `[kv_heads, group, queries, keys]` by the model's own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
    kv_heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    return [attention[0].unflatten(0, (kv_heads, -1)) for attention in attentions]


@by_family
def test_a_models_lifespans_are_those_of_its_eager_attention(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(TOKENS)
    labels = label_window(model, ids, LabelSpec(THRESHOLDS))
    for layer, attention in enumerate(eager_attention(model, ids)):
        same(labels.lifespan[:, layer], naive_lifespan(attention, THRESHOLDS))
    assert len(labels.lifespan.unique()) > 5


@by_family
def test_a_models_future_attention_is_that_of_its_eager_attention(family: str) -> None:
    model, ids, ages = FAMILIES[family](), token_ids(TOKENS), (1, 6, 20)
    labels = label_window(model, ids, LabelSpec((0.05,), ages, 19))
    assert labels.future_attention is not None
    for layer, attention in enumerate(eager_attention(model, ids)):
        naive = torch.tensor(naive_future(attention, ages, 19))
        torch.testing.assert_close(labels.future_attention[:, layer], naive, atol=1e-5, rtol=0, equal_nan=True)


@by_family
@pytest.mark.parametrize("setting", ["bfloat16", "float64", "autocast"])
def test_labels_depend_neither_on_the_default_dtype_nor_on_autocast(family: str, setting: str) -> None:
    model, ids, spec = FAMILIES[family](), token_ids(TOKENS), LabelSpec(THRESHOLDS, (3,), 8)
    expected = label_window(model, ids, spec, post_rope=True)
    before = torch.get_default_dtype()
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            torch.set_default_dtype(before if setting == "autocast" else getattr(torch, setting))
            found = label_window(model, ids, spec, post_rope=True)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in vars(expected).items():
        assert vars(found)[name].dtype == tensor.dtype, name
        torch.testing.assert_close(vars(found)[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_future_attention_is_summed_in_float32_whatever_the_default_dtype() -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        labels = LayerLabels(LabelSpec((0.05,), (1,), 2), 2, 5, torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert labels.future_attention().dtype == torch.float32


@by_family
def test_a_windows_tensors_keep_their_dtypes_and_shapes(family: str) -> None:
    model = FAMILIES[family]()
    kv_heads = 4 if family == "gpt2" else 2
    head_dim = 12 if family == "qwen3" else 8
    labels = label_window(model, token_ids(TOKENS).tolist(), LabelSpec((0.05, 0.1), (1, 2, 3), 8), post_rope=True)
    expected = {
        "keys": (torch.float16, (2, kv_heads, TOKENS, head_dim)),
        "keys_post_rope": (torch.float16, (2, kv_heads, TOKENS, head_dim)),
        "lifespan": (torch.int32, (2, 2, kv_heads, TOKENS)),
        "horizon": (torch.int32, (TOKENS,)),
        "future_attention": (torch.float32, (3, 2, kv_heads, TOKENS)),
    }
    assert {name: (getattr(labels, name).dtype, tuple(getattr(labels, name).shape)) for name in expected} == expected


def test_what_was_not_asked_for_is_none() -> None:
    labels = label_window(llama(), token_ids(8), LabelSpec())
    assert labels.keys_post_rope is None
    assert labels.future_attention is None


def test_the_horizon_counts_the_later_queries() -> None:
    assert label_window(llama(), token_ids(5), LabelSpec()).horizon.tolist() == [4, 3, 2, 1, 0]


@by_family
def test_keys_are_those_of_the_key_projection_rounded_to_half(family: str) -> None:
    model, ids = FAMILIES[family](), token_ids(TOKENS)
    seen = []
    name = {"gpt2": "c_attn", "qwen3": "k_norm"}.get(family, "k_proj")
    for module_name, module in model.named_modules():
        if module_name.endswith(name):
            module.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    labels = label_window(model, ids, LabelSpec())
    for layer, output in enumerate(seen):
        flat = output.chunk(3, dim=-1)[1] if family == "gpt2" else output
        heads = flat.reshape(TOKENS, labels.keys.shape[1], -1).transpose(0, 1)
        assert torch.equal(labels.keys[layer], heads.half())


def test_keys_after_the_rotary_embedding_differ_but_at_position_0() -> None:
    labels = label_window(llama(), token_ids(TOKENS), LabelSpec(), post_rope=True)
    assert labels.keys_post_rope is not None
    assert torch.equal(labels.keys_post_rope[:, :, 0], labels.keys[:, :, 0])
    assert (labels.keys_post_rope[:, :, 1:] != labels.keys[:, :, 1:]).any(dim=-1).all()


def test_without_a_rotary_embedding_keys_post_rope_are_the_keys() -> None:
    labels = label_window(gpt2(), token_ids(TOKENS), LabelSpec(), post_rope=True)
    assert labels.keys_post_rope is not None
    assert torch.equal(labels.keys_post_rope, labels.keys)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_is_told_with_its_layer(value: float, projection: str, layer: int) -> None:
    model = llama()
    model.model.layers[layer].self_attn.get_submodule(projection).weight.data[0] = value
    with pytest.raises(SmartKVError, match=f"layer {layer} "):
        label_window(model, token_ids(20), LabelSpec())


def test_keys_beyond_float16_are_refused() -> None:
    model = llama()
    model.model.layers[1].self_attn.k_proj.weight.data *= 1e6
    with pytest.raises(SmartKVError, match=r"layer 1 .*float16"):
        label_window(model, token_ids(20), LabelSpec())


@by_family
def test_a_window_longer_than_the_positions_is_refused_naming_both(family: str) -> None:
    model = FAMILIES[family](max_position_embeddings=32)
    check_window(model, 32)
    check_window(model, 1)
    with pytest.raises(SmartKVError, match=r"33 tokens.* 32 positions"):
        label_window(model, token_ids(33), LabelSpec())


@pytest.mark.parametrize("thresholds", [(), (0.0,), (1.0,), (-0.1,), (0.05, 1.5), (math.nan,)])
def test_thresholds_that_are_no_probabilities_are_refused(thresholds: tuple[float, ...]) -> None:
    with pytest.raises(SmartKVError, match="thresholds must be"):
        LabelSpec(thresholds)


@pytest.mark.parametrize("ages", [(0,), (5, -1)])
def test_ages_below_1_are_refused(ages: tuple[int, ...]) -> None:
    with pytest.raises(SmartKVError, match="ages must be"):
        LabelSpec((0.05,), ages)


@pytest.mark.parametrize("follow_up", [0, -3])
def test_a_follow_up_below_1_is_refused(follow_up: int) -> None:
    with pytest.raises(SmartKVError, match=f"follow_up must be .* got {follow_up}"):
        LabelSpec((0.05,), (), follow_up)


def test_the_target_is_the_logarithm_to_base_4_capped_at_the_follow_up() -> None:
    target = log4_lifespan(torch.tensor([1, 2, 4, 16, 1024, 1025, 9999], dtype=torch.int32), 1024)
    assert target.dtype == torch.float32
    assert target.tolist() == [0, 0.5, 1, 2, 5, 5, 5]


@quick
@given(lifespan=st.integers(1, 10**6), low=st.integers(1, 4096), high=st.integers(1, 4096))
def test_a_higher_follow_up_never_lowers_the_target_and_caps_it(lifespan: int, low: int, high: int) -> None:
    low, high = sorted((low, high))
    below, above = (log4_lifespan(torch.tensor([lifespan]), cap).item() for cap in (low, high))
    assert below <= above
    assert above == pytest.approx(math.log(min(lifespan, high), 4), abs=1e-5)
