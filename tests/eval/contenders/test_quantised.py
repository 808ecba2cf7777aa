"""Quantised caches as contenders."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from eval.contenders.quantised import QuantisedContender
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.metrics.perplexity import token_losses
from tests.models import token_ids

TOKENS, FIRST = 96, 24


def contender(lm: Any, codec: str, at_once: int | None = 32) -> QuantisedContender:
    return QuantisedContender(lm, f"quant:{codec}", lambda: QuantizedCache(lm.model, codec, 0), at_once=at_once)


def test_float16_loses_next_to_nothing_and_holds_all_bytes(tiny_lm: Any) -> None:
    reading = contender(tiny_lm, "fp16").read(1.0, token_ids(TOKENS), FIRST, FIRST - 1, None)
    torch.testing.assert_close(
        reading.nll, token_losses(tiny_lm.model, token_ids(TOKENS), FIRST).nll, atol=5e-3, rtol=0
    )
    assert reading.footprint == 1.0 and reading.stored == pytest.approx(1.0)


def test_queries_of_later_pieces_see_rounded_keys(tiny_lm: Any) -> None:
    tokens = token_ids(TOKENS)
    pieces = contender(tiny_lm, "int4", 8).read(1.0, tokens, FIRST, 0, None).nll
    with torch.inference_mode():
        cache, hidden = QuantizedCache(tiny_lm.model, "int4", 0), []
        for piece in tokens[None, :-1].split(8, dim=1):
            hidden.append(tiny_lm.model(piece, past_key_values=cache).logits[0])
    logits = torch.cat(hidden)[FIRST - 1 :]
    expected = torch.nn.functional.cross_entropy(logits, tokens[FIRST:], reduction="none")
    torch.testing.assert_close(pieces, expected, atol=1e-4, rtol=0)
    assert (pieces - token_losses(tiny_lm.model, tokens, FIRST).nll).abs().max() > 1e-3


def test_an_opened_cache_decodes_as_transformers_does(tiny_lm: Any) -> None:
    tokens = token_ids(20)[None]
    with torch.inference_mode(), contender(tiny_lm, "fp16").open(1.0, 0) as cache:
        rounded = tiny_lm.model.generate(tokens, past_key_values=cache, max_new_tokens=5, do_sample=False)
        exact = tiny_lm.model.generate(tokens, past_key_values=DynamicCache(), max_new_tokens=5, do_sample=False)
    assert torch.equal(rounded, exact)
