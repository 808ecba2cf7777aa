"""A mask or a prompt that tells another past than the cache has seen is refused before anything is computed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import pipeline

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.attached import AttachedCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.seen_tokens import PADDING, UNKNOWN, SeenTokens
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from tests.models import llama, tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import MODELS, recent

MODEL = MODELS["llama"]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
IDS = token_ids(16, 3).clamp(min=1).view(2, 8)
PADDED = torch.ones(2, 8, dtype=torch.long)
PADDED[1, :3] = 0
CACHES: dict[str, Callable[[Any], AttachedCache]] = {
    "lifespan": lambda model: LifespanCache(model, None, recent(4)),
    "adaptive": lambda model: AdaptiveCache(model),
}


@pytest.fixture(params=CACHES)
def cache(request: pytest.FixtureRequest) -> AttachedCache:
    return CACHES[request.param](MODEL)


def refused_before(cache: AttachedCache, message: str, call: Callable[[], Any]) -> None:
    held = cache.get_seq_length()
    with pytest.raises(SmartKVError, match=message):
        call()
    assert cache.get_seq_length() == held


def with_new(mask: Tensor, new: int = 1) -> Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (None, with_new(PADDED)),
        (torch.ones_like(PADDED), with_new(PADDED)),
        (PADDED, with_new(torch.ones_like(PADDED))),
        (PADDED, with_new(PADDED.flip(1))),
        (PADDED, with_new(PADDED.flip(0))),
    ],
    ids=["no mask at first", "ones at first", "ones later", "other side", "other row"],
)
def test_a_mask_with_another_past_is_refused(cache: AttachedCache, first: Any, later: Tensor) -> None:
    MODEL(IDS, attention_mask=first, past_key_values=cache)
    refused_before(
        cache,
        r"8 tokens in the cache do not agree.*reset\(\)",
        lambda: MODEL(IDS[:, :1], attention_mask=later, past_key_values=cache),
    )
    MODEL(IDS[:, :1], past_key_values=cache)  # and it still goes on


@pytest.mark.parametrize("length", [1, 7, 8, 10, 16])
def test_a_mask_of_another_length_is_refused(cache: AttachedCache, length: int) -> None:
    MODEL(IDS, past_key_values=cache)
    call: dict[str, Any] = {"attention_mask": torch.ones(2, length), "past_key_values": cache}
    refused_before(cache, "must be 9", lambda: MODEL(IDS[:, :1], **call))


def test_a_mask_longer_than_the_first_call_is_refused(cache: AttachedCache) -> None:
    refused_before(cache, "must be 8", lambda: MODEL(IDS, attention_mask=torch.ones(2, 9), past_key_values=cache))


@pytest.mark.parametrize("mask", [torch.full((2, 8), -1e9), torch.full((2, 8), 2), torch.zeros(2, 8) - torch.inf])
def test_an_additive_mask_is_refused(cache: AttachedCache, mask: Tensor) -> None:
    refused_before(
        cache, "zeros for padding, got other numbers", lambda: MODEL(IDS, attention_mask=mask, past_key_values=cache)
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("name", CACHES)
def test_a_mask_that_tells_the_same_past_is_taken(name: str, dtype: torch.dtype) -> None:
    found = []
    for later in (True, False):
        cache = CACHES[name](MODEL)
        with torch.no_grad():
            MODEL(IDS, attention_mask=PADDED.to(dtype), past_key_values=cache)
            mask = with_new(PADDED).to(dtype) if later else None
            found.append(MODEL(IDS[:, :1], attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*found)


def test_padding_of_new_tokens_counts_as_past_from_then_on(cache: AttachedCache) -> None:
    MODEL(IDS, past_key_values=cache)
    mask = torch.cat([torch.ones_like(PADDED), PADDED], dim=1)
    MODEL(IDS, attention_mask=mask, past_key_values=cache)
    MODEL(IDS[:, :1], attention_mask=with_new(mask), past_key_values=cache)
    refused_before(
        cache, "do not agree", lambda: MODEL(IDS[:, :1], attention_mask=torch.ones(2, 18), past_key_values=cache)
    )


def test_the_past_follows_the_rows_of_the_batch(cache: AttachedCache) -> None:
    MODEL(IDS, attention_mask=PADDED, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    MODEL(IDS[:, :1], attention_mask=with_new(PADDED.flip(0)), past_key_values=cache)
    cache.batch_select_indices(torch.tensor([False, True]))
    cache.batch_repeat_interleave(2)
    mask = with_new(PADDED[:1], 2).repeat(2, 1)
    MODEL(IDS[:, :1], attention_mask=mask, past_key_values=cache)
    assert cache.seen_tokens.ids.shape == (2, 10)


# -- prompts ----------------------------------------------------------------------------------------------------------


def generate(prompt: Tensor, cache: AttachedCache, **options: Any) -> Tensor:
    return MODEL.generate(prompt, past_key_values=cache, **GREEDY | options)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda first: first[:, :8], "holds 11 tokens already, and the prompt has 8.*reset"),
        (lambda first: first[:, :11], "holds 11 tokens already, and the prompt has 11"),
        (lambda _: token_ids(8, 5).clamp(min=1)[None], "holds 11 tokens already"),
        (lambda _: token_ids(20, 5).clamp(min=1)[None], "another text: the prompt differs from token 0"),
        (lambda first: torch.cat([first[:, :6], first[:, 6:] % 60 + 1], dim=1), "differs from token 6"),
    ],
    ids=["same prompt", "as long", "shorter", "another", "edited"],
)
def test_a_prompt_that_does_not_go_on_from_the_cache_is_refused(
    cache: AttachedCache, second: Callable[[Tensor], Tensor], message: str
) -> None:
    first = generate(IDS[:1], cache)
    refused_before(cache, message, lambda: generate(second(first), cache))


def test_the_whole_conversation_and_a_reset_cache_are_taken(cache: AttachedCache) -> None:
    first = generate(IDS[:1], cache)
    longer = torch.cat([first, IDS[1:]], dim=1)
    assert generate(longer, cache, attention_mask=torch.ones_like(longer)).shape[1] == longer.shape[1] + 4
    cache.reset()
    assert torch.equal(generate(IDS[:1], cache), first)


def test_new_tokens_alone_are_taken_with_a_mask_of_the_whole_conversation(cache: AttachedCache) -> None:
    first = generate(IDS[:1], cache)
    new = torch.cat([first[:, 11:], IDS[1:]], dim=1)  # the last token of the answer has not been through the model
    got = generate(new, cache, attention_mask=torch.ones(1, 11 + 9).long())
    assert got.shape[1] == 9 + 4 and cache.get_seq_length() == 11 + 9 + 3


@pytest.mark.parametrize("name", ["inputs", "input_ids"])
def test_a_prompt_that_is_given_by_name_is_compared_too(cache: AttachedCache, name: str) -> None:
    generate(IDS[:1], cache)
    call: dict[str, Any] = {name: token_ids(20, 5).clamp(min=1)[None], "past_key_values": cache, **GREEDY}
    refused_before(cache, "another text: the prompt differs from token 0", lambda: MODEL.generate(**call))


def test_each_row_of_a_batch_is_compared(cache: AttachedCache) -> None:
    first = generate(IDS, cache, attention_mask=PADDED)
    other = torch.cat([first, IDS], dim=1)
    other[1, 5] = other[1, 5] % 60 + 1
    refused_before(cache, "differs from token 5", lambda: generate(other, cache, attention_mask=with_new(PADDED, 12)))
    other[1, 5], other[1, 1] = first[1, 5], 7  # padding may hold any id
    generate(other, cache, attention_mask=with_new(PADDED, 12))


def test_the_token_0_is_a_token_like_others(cache: AttachedCache) -> None:
    prompt = torch.cat([IDS[:1, :3], torch.tensor([[0]]), IDS[:1, 3:]], dim=1)
    first = generate(prompt, cache, attention_mask=torch.ones_like(prompt))
    other = torch.cat([first, IDS[1:]], dim=1)
    other[0, 3] = 1
    refused_before(cache, "differs from token 3", lambda: generate(other, cache))


def test_embeddings_that_are_no_longer_than_the_cache_are_refused(cache: AttachedCache) -> None:
    embeddings = MODEL.get_input_embeddings()(IDS[:1])
    MODEL.generate(inputs_embeds=embeddings, past_key_values=cache, **GREEDY)
    refused_before(
        cache,
        "holds 11 tokens already, and the prompt has 8",
        lambda: MODEL.generate(inputs_embeds=embeddings, past_key_values=cache, **GREEDY),
    )


def test_embeddings_are_compared_with_the_ids_that_the_cache_holds(cache: AttachedCache) -> None:
    embed = MODEL.get_input_embeddings()
    first = generate(IDS[:1], cache)
    other = token_ids(20, 5).clamp(min=1)[None]
    call: dict[str, Any] = {"past_key_values": cache, **GREEDY}
    refused_before(cache, "another text", lambda: MODEL.generate(inputs_embeds=embed(other), **call))
    other = torch.cat([first, IDS[1:]], dim=1)
    other[0, 5] = other[0, 5] % 60 + 1
    refused_before(cache, "differs from token 5", lambda: MODEL.generate(inputs_embeds=embed(other), **call))
    MODEL.generate(inputs_embeds=embed(torch.cat([first, IDS[1:]], dim=1)), **call)


def test_several_answers_to_one_prompt_are_compared_with_it(cache: AttachedCache) -> None:
    first = generate(IDS[:1], cache, do_sample=True, num_return_sequences=3)
    assert cache.seen_tokens.ids.shape == (3, 11)
    refused_before(cache, "another text", lambda: generate(IDS[:1].flip(1).repeat(1, 3), cache))
    refused_before(cache, "holds 3 rows, the model was given 2", lambda: generate(IDS.repeat(1, 3), cache))
    longer = torch.cat([first, IDS[:1].repeat(3, 1)], dim=1)
    generate(longer, cache, attention_mask=torch.ones_like(longer))


def test_a_pipeline_over_a_list_is_told_to_reset() -> None:
    model = llama(vocab_size=264, bos_token_id=256, eos_token_id=256)
    pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    cache = LifespanCache(model, None, recent(4))
    with pytest.raises(SmartKVError, match=r"reset\(\)"):
        pipe(["abcdefgh", "ijkl"], past_key_values=cache, max_new_tokens=4, do_sample=False)


def test_a_loaded_cache_knows_what_it_was_fed(tmp_path: Path) -> None:
    cache = LifespanCache(MODEL, None, recent(4))
    MODEL(IDS, attention_mask=PADDED, past_key_values=cache)
    save_cache(cache, tmp_path / "prompt.safetensors")
    loaded = load_cache(tmp_path / "prompt.safetensors", MODEL)
    assert torch.equal(loaded.seen_tokens.ids, IDS.masked_fill(PADDED == 0, PADDING).int())
    refused_before(
        loaded, "do not agree", lambda: MODEL(IDS[:, :1], attention_mask=torch.ones(2, 9), past_key_values=loaded)
    )


# -- the record -------------------------------------------------------------------------------------------------------


def test_the_record_holds_ids_padding_and_unknown_tokens() -> None:
    seen = SeenTokens()
    assert seen.real(0) is None and seen.ids.shape == (0, 0)
    seen.append(IDS[:, :2], None)
    seen.append(torch.zeros(2, 2, 4), PADDED[:, 2:4].bool())
    assert seen.ids[0].tolist() == [*IDS[0, :2].tolist(), UNKNOWN, UNKNOWN]
    assert seen.ids[1].tolist() == [*IDS[1, :2].tolist(), PADDING, UNKNOWN]
    seen.keep(3)
    assert seen.ids.shape == (2, 3) and seen.real(3)[1].tolist() == [True, True, False]  # type: ignore[index]
    twin = copy.deepcopy(seen)
    seen.reset()
    assert twin.ids.shape == (2, 3) and not seen.padded


def test_positions_go_on_from_the_real_tokens_of_each_row() -> None:
    seen, ids = SeenTokens(), token_ids(8).view(2, 4)
    real = torch.tensor([[True] * 4, [False, False, True, True]])
    assert seen.positions(ids, real).tolist() == [[0, 1, 2, 3], [-1, -1, 0, 1]]
    seen.append(ids, real)
    assert seen.positions(ids[:, :2], None).tolist() == [[4, 5], [2, 3]]
    assert seen.positions(torch.zeros(2, 2, 5), None).tolist() == [[4, 5], [2, 3]]  # embeddings
