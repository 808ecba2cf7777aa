"""Caches, gates and labels of models that are wrapped, packed or offloaded."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.forward_pass import EvictionStep
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache
from smartkv.errors import SmartKVError
from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import LabelSpec, label_window
from smartkv.models.architecture import Fingerprint
from smartkv.models.softmax import Softmax
from smartkv.models.wrappers import language_model
from smartkv.policies.budgets import Calibration
from tests.models import llama, token_ids
from tests.smartkv.cache.fixtures import GATED, random_gates, state
from tests.wrapped_models import PACKED, WRAPPERS, ValueHead

FORMS = WRAPPERS | PACKED
IDS = token_ids(24)[None]
by_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def gates(tmp_path: Path) -> Path:
    """The folder of gates for the tiny Llama."""
    random_gates(llama()).save_pretrained(tmp_path / "gates")
    return tmp_path / "gates"


@torch.no_grad()
def logits(model: nn.Module, cache: Any = None, ids: Tensor = IDS) -> Tensor:
    output = model(input_ids=ids, past_key_values=cache)
    return output[0] if isinstance(output, tuple) else output.logits


@by_form
def test_a_cache_that_keeps_all_keys_gives_the_model_s_own_logits(form: str) -> None:
    model = FORMS[form](llama())
    want, before = logits(model), state(language_model(model))
    with LifespanCache(model, None, "full") as cache:
        torch.testing.assert_close(logits(model, cache), want, atol=1e-5, rtol=0)
    assert cache.footprint == 1 and state(language_model(model)) == before


@by_form
def test_gates_by_name_decide_as_gates_that_were_loaded(form: str, gates: Path) -> None:
    model = FORMS[form](llama())
    named = LifespanCache(model, gates, GATED)
    loaded = LifespanCache(model, GateBank.from_pretrained(gates, model), GATED)
    assert torch.equal(logits(model, named), logits(model, loaded))
    assert torch.equal(named.live_keys, loaded.live_keys) and 0 < named.footprint < 1


@by_form
def test_a_saved_prompt_goes_on_where_it_stopped(form: str, gates: Path, tmp_path: Path) -> None:
    model, more = FORMS[form](llama()), token_ids(3, seed=5)[None]
    cache = LifespanCache(model, gates, GATED)
    logits(model, cache)
    save_cache(cache, tmp_path / "prompt.safetensors")
    loaded = load_cache(tmp_path / "prompt.safetensors", model, gates)
    assert torch.equal(logits(model, loaded, more), logits(model, cache, more))


@by_form
def test_other_caches_and_calibration_take_it_too(form: str, gates: Path) -> None:
    model = FORMS[form](llama())
    assert logits(model, QuantizedCache(model, "int8")).isfinite().all()
    assert logits(model, AdaptiveCache(model, gates)).isfinite().all()
    bank = GateBank.from_pretrained(gates)
    assert 0 < Calibration.measure(model, bank, [IDS[0]]).footprint(GATED) < 1
    assert Calibration.measure(model, None, [IDS[0]]).layers == 2


@by_form
def test_its_keys_are_labelled_as_the_model_inside_labels_them(form: str) -> None:
    model = FORMS[form](llama())
    labels = label_window(model, IDS[0], LabelSpec(follow_up=8))
    inside = label_window(language_model(model), IDS[0], LabelSpec(follow_up=8))
    assert torch.equal(labels.keys, inside.keys) and torch.equal(labels.lifespan, inside.lifespan)
    if form in WRAPPERS and form != "LoRA":
        assert torch.equal(labels.keys, label_window(llama(), IDS[0], LabelSpec(follow_up=8)).keys)


@pytest.mark.parametrize("form", ["value head", "LoRA", "on the disk", "no weight"])
def test_generating_through_it_fills_the_cache(form: str, gates: Path) -> None:
    model = FORMS[form](llama())
    cache = LifespanCache(model, gates, GATED)
    fixed = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(input_ids=IDS, past_key_values=cache, **fixed)
    assert output.shape[1] == 28 and cache.get_seq_length() == 27


@pytest.mark.parametrize("form", PACKED)
def test_packed_weights_warn_that_they_are_others(form: str, gates: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GateBank.from_pretrained(gates, PACKED[form](llama()))
    assert caplog.text.count("trained on other weights") == 1


@pytest.mark.parametrize("form", WRAPPERS)
def test_the_model_s_own_weights_in_a_wrapper_do_not(form: str, gates: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="smartkv"):
        GateBank.from_pretrained(gates, WRAPPERS[form](llama()))
    assert "weights" not in caplog.text


def test_weights_that_cannot_be_read_only_warn(
    gates: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    with caplog.at_level(logging.WARNING):
        GateBank.from_pretrained(gates, llama().to("meta"))
    assert "weights cannot be read and compared" in caplog.text
    caplog.clear()
    cache = LifespanCache(model, gates, GATED)
    logits(model, cache)
    monkeypatch.setattr("smartkv.models.architecture.weight_hash", lambda _: "")
    save_cache(cache, tmp_path / "prompt.safetensors")
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        load_cache(tmp_path / "prompt.safetensors", model, gates)
    assert "weights cannot be read and compared" in caplog.text


class MaskElsewhere:
    """A mask on another device, of which a layer may only ask for a copy on its own."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.asked = mask, list[torch.device]()

    def to(self, device: torch.device) -> Tensor:
        self.asked.append(device)
        return self.mask


def test_padding_goes_to_the_device_of_a_layer_s_keys() -> None:
    model = llama()
    cache, key, query = LifespanCache(model, None, "full"), torch.randn(1, 2, 3, 8), torch.randn(1, 4, 3, 8)
    mask = MaskElsewhere(torch.tensor([[False, True, True]]))
    output = cache.attend(1, EvictionStep(query, key, key, key, mask, Softmax(1.0), None))  # type: ignore[arg-type]
    assert mask.asked == [torch.device("cpu")] and not output[0, :, 0].any() and output[0, :, 1:].any()


def test_a_layer_without_the_module_that_gives_its_keys_is_refused_before_the_model_is_touched() -> None:
    model = llama()
    del model.model.layers[1].self_attn.k_proj
    before = state(model)
    with pytest.raises(SmartKVError, match="layer 1 of this LlamaForCausalLM has no module k_proj"):
        LifespanCache(model, None, "full")
    assert state(model) == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ModuleList([llama(), llama()]), "holds 2 of them"),
        (type("Pipeline", (), {"model": llama()})(), r"got a Pipeline: give its attribute \.model"),
        (nn.Linear(2, 2), "got a Linear"),
        ("a/model", r"load it with AutoModelForCausalLM\.from_pretrained\('a/model'\)"),
        (None, "got None"),
    ],
    ids=["two", "pipeline", "linear", "name", "none"],
)
def test_what_holds_no_model_is_refused_by_all_that_take_one(model: Any, message: str, gates: Path) -> None:
    for call in (
        lambda: LifespanCache(model, gates, GATED),
        lambda: Fingerprint.of(model),
        lambda: label_window(model, [1, 2], LabelSpec()),
        lambda: Calibration.measure(model, None, [IDS[0]]),
        lambda: GateBank.from_pretrained(gates).check(model),
    ):
        with pytest.raises(SmartKVError, match=message):
            call()


def test_the_cache_of_a_value_head_s_model_is_seen_by_it() -> None:
    """The cache belongs to the model inside: both names lead to it."""
    model = llama()
    cache = LifespanCache(ValueHead(model), None, "full")
    assert cache.model is model
    assert torch.equal(logits(model, cache), logits(ValueHead(model), LifespanCache(model, None, "full")))
