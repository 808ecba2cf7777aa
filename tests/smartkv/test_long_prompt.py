"""A prompt far longer than what is kept: the peak follows the policy."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from smartkv.backbones import Fingerprint, fastest_dtype
from smartkv.cache import LifespanCache
from smartkv.gates import GateBank
from smartkv.perplexity import full_cache_bytes
from smartkv.policies import HybridPolicy, LayerRule
from tests.models import token_ids

TOKENS = 32_768


def smollm2_shape(layers: int) -> PreTrainedModel:
    """SmolLM2-135M's shape with random weights, and positions for a long prompt."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, vocab_size=256, num_hidden_layers=layers, max_position_embeddings=TOKENS)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=fastest_dtype()).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["capped", "gated"])
@torch.inference_mode()
def test_a_prompt_of_32k_tokens_peaks_within_1_3_of_what_is_held_at_its_end(kept: str) -> None:
    torch.set_num_threads(2)
    model = smollm2_shape(30)
    torch.manual_seed(1)
    gates, ids = GateBank(Fingerprint.of(model)), token_ids(TOKENS, vocabulary=256)[None]
    rules = (LayerRule("all", "gated", 256),)
    cap = 2048 if kept == "capped" else None
    policy = HybridPolicy(rules, price=0.35, max_tokens=cap)  # untrained gates predict about 0 ± 0.3: some keys stay
    cache = LifespanCache(model, gates, policy)
    model(ids, past_key_values=cache, logits_to_keep=1)
    print(f"{kept}: footprint {cache.footprint:.3f}, {cache.storage_bytes:,} bytes held, peak {cache.peak_bytes:,}")
    assert cache.storage_bytes < 0.5 * full_cache_bytes(model, TOKENS)
    assert cache.peak_bytes <= 1.3 * cache.storage_bytes
