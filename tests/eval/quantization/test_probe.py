"""The probe of codecs: exact attention, errors and times."""

import pytest
import torch
from transformers import DynamicCache

from eval.quantization.probe import CodecComparison, Probe, synthetic_layer
from eval.quantization.stand_ins import Shape
from smartkv.quantization.codecs import Adaptive, Half, Uniform
from tests.families import OWN_SOFTMAX, make
from tests.models import FAMILIES, token_ids


@pytest.mark.parametrize("family", [*FAMILIES, *OWN_SOFTMAX])
def test_the_probe_attends_exactly_and_measures_the_error_of_the_output(family: str) -> None:
    model, ids = make(family), token_ids(40)[None]
    with torch.inference_mode():
        want = model(ids, past_key_values=DynamicCache(config=model.config)).logits
        codecs = {"half": Half(), "int4": Uniform(4), "bits": Adaptive(0.9, block=8, levels=(2, 4, 8))}
        with Probe(model, CodecComparison(codecs)) as probe:
            found = model(ids, past_key_values=probe).logits
    assert torch.allclose(found, want, atol=1e-4)
    errors = probe.comparison.errors()
    assert 0 < errors["half"]["error_output"] < 2e-3 < errors["int4"]["error_output"] < 0.5
    key, value, importance = probe.comparison.layers_read[0]
    mine, _ = Uniform(4).decode(Uniform(4).encode(key, value, None), torch.float32)
    first = float((mine - key).norm() / key.norm())
    assert probe.comparison.errors_by_layer["int4"]["error_key"][0] == pytest.approx(first, rel=1e-5)
    # a block's bits are chosen when it is full: by then its queries, and earlier ones, have looked at it
    looked = 8 * model.config.num_attention_heads
    assert importance["half"] is None and importance["bits"][..., :8].sum() <= looked * 1.0001
    if family != "gpt_oss":  # whose learned sinks take a share
        assert importance["bits"][..., :8].sum() == pytest.approx(looked, rel=1e-4)


def test_every_codec_has_its_times() -> None:
    model, ids = FAMILIES["qwen2"](), token_ids(32)[None]
    with torch.inference_mode(), Probe(model, CodecComparison({"half": Half(), "int4": Uniform(4)})) as probe:
        model(ids, past_key_values=probe)
    times = probe.comparison.times(2)
    assert set(times) == {"half", "int4"}
    assert all(row["encode_ms"] > 0 and row["decode_ms"] > 0 for row in times.values())


def test_texts_are_a_multiple_of_every_codec_s_block() -> None:
    codecs = {"half": Half(), "eight": Adaptive(0.9, block=8, levels=(2, 4, 8)), "twelve": Adaptive(0.9, block=12)}
    assert CodecComparison(codecs).block == 24


def test_synthetic_keys_have_outlier_channels_that_hurt_few_bits() -> None:
    step = synthetic_layer(Shape(2, 3, 64), 128, seed=1)
    assert step.key.shape == step.value.shape == step.query.shape == (1, 3, 128, 64)
    assert step.key[..., ::16].std() > 4 * step.key[..., 1::16].std() > 0
    comparison = CodecComparison({"int8": Uniform(8), "int4": Uniform(4)})
    comparison.read(step)
    errors = comparison.errors()
    assert errors["int8"]["error_key"] < errors["int4"]["error_key"] < 0.5
    assert torch.equal(synthetic_layer(Shape(2, 3, 64), 128, seed=1).key, step.key)
