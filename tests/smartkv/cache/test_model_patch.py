"""A patched model takes a LifespanCache in place of any other cache: generate, pipelines, calls by hand."""

import copy
import gc
import inspect
import itertools
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.errors import SmartKVError
from smartkv.policies.hybrid import HybridPolicy, LayerRule
from tests.models import FAMILIES, llama, tiny_tokenizer, token_ids
from tests.smartkv.cache.fixtures import (
    GATED,
    MODELS,
    Injected,
    fed,
    gated_logits,
    random_gates,
    random_ttl,
    recent,
    sliding,
    state,
)
from tests.smartkv.cache.masked_reference import masked_logits, positions, visibility

FULL = HybridPolicy((LayerRule("all", "full"),))
FIXED = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}  # always 8 tokens
END_OF_TEXT = {"vocab_size": 264, "bos_token_id": 256, "eos_token_id": 256}  # of the tiny tokenizer


def words(length: int, seed: int = 0) -> Tensor:
    """Ids without 0, which `generate` takes for padding when no mask is given."""
    return token_ids(length, seed).clamp(min=1)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mistral_sliding"])
def test_generate_takes_the_cache_without_a_with_and_the_model_is_free_when_it_dies(family: str) -> None:
    model, ids = MODELS[family], token_ids(12)[None]
    before = state(model)
    call = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(ids, **call)
    got = model.generate(ids, past_key_values=LifespanCache(model, None, recent(64), chunk=5), **call)
    assert got.tolist() == want.tolist()
    gc.collect()
    assert state(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_gives_the_tokens_of_the_masked_model(family: str) -> None:
    model, prompt, count = MODELS[family], token_ids(12, 4)[None], 8
    ttl = random_ttl(model, 1, 12 + count, 5)
    cache = Injected(model, None, recent(3, 1))
    cache.table = ttl
    with cache:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        got = model.generate(prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt), **options)
    ids = prompt
    for _ in range(count):
        real = torch.ones_like(ids, dtype=torch.bool)
        masks = [visibility(layer[..., : ids.shape[1]], 3, 1, real, sliding(model)) for layer in ttl]
        scores = masked_logits(model, ids, masks, real)[:, -1].clone()
        scores[:, model.config.eos_token_id] = float("-inf")  # min_new_tokens
        ids = torch.cat([ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
    assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_padded_batch_generates_what_each_row_generates_alone(family: str) -> None:
    model, ids = MODELS[family], token_ids(24, 2).clamp(min=1).view(2, 12)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, :5] = False
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}

    def generate(prompt: Tensor, mask: Tensor) -> list[list[int]]:
        with LifespanCache(model, None, recent(4, 2)) as cache:
            return model.generate(prompt, attention_mask=mask.long(), past_key_values=cache, **options)[:, -6:].tolist()

    alone = [generate(row[own][None], own[own][None])[0] for row, own in zip(ids, real, strict=True)]
    assert generate(ids, real) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_the_argument_may_be_called_as_this_transformers_calls_it(family: str) -> None:
    """`past_key_values`, or `cache` since 5.24."""
    model, ids = MODELS[family], words(12)[None]
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
    found = []
    for called in (name, "past_key_values"):
        cache = LifespanCache(model, None, recent(3, 1))
        sequence = model.generate(ids, **{called: cache}, **FIXED)
        found.append((sequence.tolist(), model.base_model(sequence[:, -1:], **{called: cache})[0].tolist()))
    assert found[0] == found[1]


def test_a_prompt_may_come_as_embeddings() -> None:
    model, ids = MODELS["llama"], words(12, 1)[None]
    want = model.generate(ids, past_key_values=LifespanCache(model, None, recent(4, 1)), **FIXED)[:, 12:]
    embedded = model.get_input_embeddings()(ids)
    got = model.generate(
        inputs_embeds=embedded, past_key_values=LifespanCache(model, None, recent(4, 1), chunk=5), **FIXED
    )
    assert got.tolist() == want.tolist()


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampling_with_everything_kept_is_that_of_the_usual_cache(family: str) -> None:
    model, ids, drawn = MODELS[family], words(12)[None], []
    for cache in (None, LifespanCache(model, None, FULL)):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, past_key_values=cache, **FIXED | {"do_sample": True}).tolist())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_draws_from_the_probabilities_of_the_masked_model(family: str) -> None:
    model, gates, ids = MODELS[family], random_gates(MODELS[family]), words(12, 2)[None]
    torch.manual_seed(5)
    with LifespanCache(model, gates, GATED) as cache:
        got = model.generate(ids, past_key_values=cache, **FIXED | {"do_sample": True, "top_k": 0})
    torch.manual_seed(5)
    for _ in range(8):
        logits = gated_logits(model, gates, ids)[:, -1]
        ids = torch.cat([ids, torch.multinomial(logits.softmax(dim=-1), 1)], dim=1)
    assert got.tolist() == ids.tolist()


def test_several_sequences_of_one_prompt_each_have_a_row_of_their_own() -> None:
    model, gates, ids = MODELS["qwen3"], random_gates(MODELS["qwen3"]), words(12, 3)[None]
    torch.manual_seed(1)
    with LifespanCache(model, gates, GATED) as cache:
        options = FIXED | {"do_sample": True, "num_return_sequences": 3, "output_logits": True}
        found = model.generate(ids, past_key_values=cache, return_dict_in_generate=True, **options)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 3
    for row, sequence in enumerate(found.sequences):
        want = gated_logits(model, gates, sequence[None, :-1])[0, 11:]
        got = torch.stack([step[row] for step in found.logits])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


# -- beam search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_beam_search_with_everything_kept_is_that_of_the_usual_cache(family: str) -> None:
    model, prompt = MODELS[family], token_ids(10, 7).clamp(min=1)[None]
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    usual = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    with LifespanCache(model, None, FULL) as cache:
        ours = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)
    assert ours.tolist() == usual.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_beam_scores_what_the_masked_model_gives_its_tokens(family: str) -> None:
    """Two prompts, whose beams leave and take each other's rows at every token."""
    model, gates, prompts = MODELS[family], random_gates(MODELS[family]), words(20, 8).view(2, 10)
    swaps: list[list[int]] = []

    class Watched(LifespanCache):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            swaps.append(beam_idx.tolist())
            super().reorder_cache(beam_idx)

    options = FIXED | {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    with Watched(model, gates, GATED) as cache:
        found = model.generate(
            prompts, past_key_values=cache, return_dict_in_generate=True, output_scores=True, **options
        )
    assert any(rows != sorted(rows) or len(set(rows)) < 6 for rows in swaps)
    for sequence, score in zip(found.sequences, found.sequences_scores, strict=True):
        logits = gated_logits(model, gates, sequence[None, :-1])[0, 9:]
        own = logits.log_softmax(dim=-1).gather(1, sequence[10:, None]).sum()
        torch.testing.assert_close(score, own, atol=2e-4, rtol=0)


# -- model(...) by hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [7], [3, 4, 9, 10, 11], list(range(1, 20))], ids=len)
def test_by_hand_in_pieces_or_token_by_token_the_logits_are_the_same(cuts: list[int]) -> None:
    model, gates, ids = MODELS["qwen2"], random_gates(MODELS["qwen2"]), words(20, 9)[None]
    cache, parts = LifespanCache(model, gates, GATED, chunk=6), []
    with torch.no_grad():
        for start, stop in itertools.pairwise([0, *cuts, 20]):
            output = model(ids[:, start:stop], past_key_values=cache)
            assert output.past_key_values is cache and cache.get_seq_length() == stop
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), gated_logits(model, gates, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("return_dict", [True, False])
def test_hidden_states_of_a_call_in_chunks_are_those_of_all_its_tokens(return_dict: bool) -> None:
    model, ids = (
        llama(),
        token_ids(2 * 21, 4).view(2, 21),
    )  # transformers leaves hooks on a model that is asked for them
    asked = {"output_hidden_states": True, "return_dict": return_dict}

    def states(**call: Any) -> tuple[Tensor, ...]:
        output = model.base_model(ids, **asked, **call)
        if return_dict:
            return (output.last_hidden_state, *output.hidden_states)
        last, *others = output
        (hidden,) = (each for each in others if isinstance(each, tuple))
        assert call["use_cache"] is False or others[0] is cache
        return (last, *hidden)

    with torch.no_grad(), LifespanCache(model, None, FULL, chunk=8) as cache:
        got, want = states(past_key_values=cache, use_cache=True), states(use_cache=False)
    assert len(got) == len(want) == 2 + model.config.num_hidden_layers
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


# -- rows of the batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0])), [1, 1, 0]),
    ],
    ids=["repeat", "select", "select by bool", "reorder"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_change_of_rows_each_goes_on_as_if_it_were_alone(family: str, change: Any, rows: list[int]) -> None:
    """Three rows of unlike length, some of whose tokens came one by one just before."""
    model, gates = MODELS[family], random_gates(MODELS[family])
    before, after = token_ids(3 * 20, 4).view(3, 20), token_ids(len(rows) * 20, 5).view(len(rows), 20)
    real = torch.ones(3, 40, dtype=torch.bool)
    real[1, :4], real[2, :9] = False, False
    cache = LifespanCache(model, gates, GATED, chunk=8)
    fed(model, cache, before, real[:, :20], [15, 16, 17, 18, 19])
    change(cache)
    with torch.no_grad():
        parts = []
        for start, stop in itertools.pairwise([20, 28, *range(29, 41)]):
            mask = real[rows, :stop]
            call = {"attention_mask": mask.long(), "position_ids": positions(mask)[:, start:stop]}
            with cache:
                parts.append(model(after[:, start - 20 : stop - 20], past_key_values=cache, **call).logits)
    for place, row in enumerate(rows):
        own = torch.cat([before[row, real[row, :20]], after[place]])
        got = torch.cat(parts, dim=1)[place]
        torch.testing.assert_close(got, gated_logits(model, gates, own[None])[0, -20:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda cache: cache.batch_select_indices(torch.tensor([0, 2])), "between 0 and 1"),
        (lambda cache: cache.batch_select_indices(torch.tensor([True])), r"shape \[2\], got \[1\]"),
        (lambda cache: cache.reorder_cache(torch.tensor([-1, 0])), "between 0 and 1"),
    ],
    ids=["select", "select by bool", "reorder"],
)
def test_rows_that_are_not_there_are_refused_and_nothing_changes(change: Any, told: str) -> None:
    model, ids = MODELS["llama"], token_ids(20, 4).view(2, 10)
    with LifespanCache(model, random_gates(model), GATED) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(SmartKVError, match=told):
            change(cache)
        assert model(ids[:, :1], past_key_values=cache).logits.shape[0] == 2


def test_rows_may_be_counted_from_the_end() -> None:
    model, ids = MODELS["llama"], token_ids(20, 4).view(2, 10)
    with LifespanCache(model, random_gates(model), GATED) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([-1]))
        twin.batch_select_indices(torch.tensor([1]))
        got, want = (model(ids[:1, :1], past_key_values=each).logits for each in (cache, twin))
    assert torch.equal(got, want)


# -- what transformers builds on it -----------------------------------------------------------------------------------


def test_a_pipeline_takes_it() -> None:
    model, tokenizer = llama(**END_OF_TEXT), tiny_tokenizer()
    ids = tokenizer("hello there", return_tensors="pt")["input_ids"]
    want = model.generate(ids, past_key_values=LifespanCache(model, None, recent(4, 1)), **FIXED)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with LifespanCache(model, None, recent(4, 1)) as cache:
        got = pipe("hello there", past_key_values=cache, return_tensors=True, **FIXED)
    assert got[0]["generated_token_ids"] == want[0].tolist()


def test_streamers_get_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = llama(**END_OF_TEXT), tiny_tokenizer()
    ids = tokenizer("hello there", return_tensors="pt")["input_ids"]

    def call(**more: Any) -> dict[str, Any]:
        return FIXED | {"past_key_values": LifespanCache(model, None, recent(4, 1))} | more

    want = tokenizer.decode(model.generate(ids, **call())[0])
    model.generate(ids, **call(streamer=TextStreamer(tokenizer)))
    assert capsys.readouterr().out == want + "\n"
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    thread = Thread(target=model.generate, args=(ids,), kwargs=call(streamer=streamer))
    thread.start()
    assert "".join(streamer) == want
    thread.join()
