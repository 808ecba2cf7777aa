"""Rules that compress a prompt once, with a real cache, beside an attention mask that hides what they evict."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from eval.contenders.compressed import COMPRESSING, RANDOM_PINNED, CompressedCache, compressing_rule
from smartkv import load_backbone
from smartkv.errors import FootprintOutOfReach, SmartKVError
from tests.models import save_tiny_backbone, token_ids

SETTING = {"share": 0.5, "window": 8}


def kept_tokens(lm: Any, cache: CompressedCache, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Positions that each head of each layer holds, found by the keys of a full cache."""
    full = DynamicCache()
    lm.model.base_model(input_ids=tokens[None], past_key_values=full, use_cache=True)
    found = []
    for kept, whole in zip(cache.layers, full.layers, strict=True):
        distance = (kept.keys[0][:, :, None] - whole.keys[0][:, None]).abs().amax(dim=-1)
        assert distance.amin(dim=-1).max() < 1e-4
        found.append(distance.argmin(dim=-1))
    return found


@pytest.mark.parametrize("name", COMPRESSING)
def test_a_share_of_the_prompt_stays_and_later_tokens_read_it_alone(name: str, tiny_lm: Any) -> None:
    rule, tokens = compressing_rule(name, tiny_lm, 100), token_ids(70, 1)
    text = (6, 60)
    with torch.inference_mode():
        cache = rule.compress(SETTING, tokens[:64].tolist(), 16, text)
        assert cache.get_seq_length() == 64 and cache.stored == 0.5
        held = kept_tokens(tiny_lm, cache, tokens[:64])
        always = {*range(6), *range(60, 64)} if name == RANDOM_PINNED else {*range(4), *range(56, 64)}
        assert all(always <= set(head.tolist()) and len(set(head.tolist())) == 32 for layer in held for head in layer)
        together = tiny_lm.model(tokens[None, 64:], past_key_values=cache).logits[0]
        again = rule.compress(SETTING, tokens[:64].tolist(), 16, text)
        one_by_one = [tiny_lm.model(token[None, None], past_key_values=again).logits[0, 0] for token in tokens[64:]]
        assert torch.allclose(together, torch.stack(one_by_one), atol=1e-4)
        whole = tiny_lm.model(tokens[None]).logits[0, 64:]
        assert not torch.allclose(together, whole, atol=1e-3)  # something is gone
        full = sum(range(17, 71))
        later = sum(query + 1 - 32 for query in range(64, 70))
        assert cache.footprint == pytest.approx((sum(range(17, 65)) + later) / full)


def test_a_rule_that_keeps_everything_is_the_full_cache(tiny_lm: Any) -> None:
    tokens = token_ids(40, 2)
    with torch.inference_mode():
        cache = compressing_rule("snapkv", tiny_lm, 100).compress(
            SETTING | {"share": 1.0}, tokens[:30].tolist(), 0, None
        )
        found = tiny_lm.model(tokens[None, 30:], past_key_values=cache).logits
        assert torch.allclose(found, tiny_lm.model(tokens[None]).logits[:, 30:], atol=1e-4)
        assert cache.footprint == cache.stored == 1.0


def test_later_tokens_see_what_a_mask_of_the_same_keys_shows(tmp_path: Any) -> None:
    """One layer, so that a mask over a full cache says all."""
    lm = load_backbone(str(save_tiny_backbone(tmp_path, num_hidden_layers=1)), "float32")
    tokens = token_ids(50, 3)
    rule = compressing_rule("random_pinned", lm, 100)
    with torch.inference_mode():
        cache = rule.compress(SETTING, tokens[:40].tolist(), 0, (5, 30))
        (held,) = kept_tokens(lm, cache, tokens[:40])
        found = lm.model(tokens[None, 40:], past_key_values=cache).logits[0]
        lm.model.set_attn_implementation("eager")
        group = lm.model.config.num_attention_heads // lm.model.config.num_key_value_heads
        visible = torch.ones(len(held), 50, 50, dtype=torch.bool).tril()
        for head, positions in enumerate(held):
            visible[head, 40:, :40] = False
            visible[head, 40:, positions] = True
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf")).repeat_interleave(group, dim=0)
        want = lm.model(tokens[None], attention_mask=mask[None]).logits[0, 40:]
    assert torch.allclose(found, want, atol=1e-4)


def test_what_cannot_be_compressed_is_told(tiny_lm: Any, tmp_path: Any) -> None:
    with pytest.raises(FootprintOutOfReach, match="no room"):
        compressing_rule("keydiff", tiny_lm, 100).solved(0.3)
    with pytest.raises(SmartKVError, match="do not say which tokens"):
        compressing_rule(RANDOM_PINNED, tiny_lm, 100).compress(SETTING, list(range(5, 50)), 0, None)
    assert compressing_rule("keydiff", tiny_lm, 1000).solved(0.3)["share"] == 0.3
    short = compressing_rule("keydiff", tiny_lm, 100).compress(SETTING | {"share": 0.1}, list(range(5, 45)), 0, None)
    assert short.stored == pytest.approx(12 / 40)  # sinks and window at least
