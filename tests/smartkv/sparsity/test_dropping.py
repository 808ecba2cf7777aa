"""The ways to drop keys that a config names: each is the rule it stands for."""

import math

import pytest
import torch
from torch import Tensor

from smartkv.errors import SmartKVError
from smartkv.models.backbone import Backbone, load_backbone
from smartkv.sparsity.anchors import Anchors
from smartkv.sparsity.dropping import Dropping, GateDropping, NoDropping, RandomDropping, WindowDropping
from smartkv.sparsity.key_dropout import GatedDropping, KeyDropout, window_attention
from tests.models import save_tiny_backbone, token_ids
from tests.smartkv.sparsity.fixtures import gates_for_ages

IDS = token_ids(60, vocabulary=257).view(2, 30)
SEEDS = (3, 4)
PRICE = -0.5  # a log worth; gates of both footprints have it


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """A tiny Llama with a byte-level tokenizer."""
    return load_backbone(str(save_tiny_backbone(tmp_path_factory.mktemp("backbone"))), "float32")


@pytest.fixture(scope="module")
def gates(lm: Backbone, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of gates that judge by age."""
    folder = tmp_path_factory.mktemp("gates")
    gates_for_ages(lm.model, PRICE).save_pretrained(folder)
    return str(folder)


def logits_and_footprint(dropping: Dropping, lm: Backbone) -> tuple[Tensor, float]:
    """The model's logits on `IDS` at a keep ratio of 0.5, and the footprint from query 5 on."""
    dropping.prepare(lm)
    with torch.no_grad(), dropping.inside(lm, IDS, 0.5, SEEDS) as seen:
        return lm.model(IDS, use_cache=False).logits, float(seen(5))


def full_logits(lm: Backbone) -> Tensor:
    with torch.no_grad():
        logits: Tensor = lm.model(IDS, use_cache=False).logits
    return logits


def test_no_dropping_is_the_model_itself(lm: Backbone) -> None:
    logits, footprint = logits_and_footprint(NoDropping(), lm)
    assert torch.equal(logits, full_logits(lm)) and footprint == 1


@pytest.mark.parametrize("share", ["head", "layer", "model"])
def test_random_dropping_is_a_draw_beside_its_anchors(share: str, lm: Backbone) -> None:
    logits, footprint = logits_and_footprint(RandomDropping(2, 6, punctuation=False, share=share), lm)
    anchors = Anchors(2, 6, punctuation=False)
    always = anchors.always(IDS, anchors.table(lm.tokenizer))
    with torch.no_grad(), KeyDropout(2, 2, 6, share).dropped(lm.model, always, 0.5, SEEDS) as seen:
        assert torch.equal(logits, lm.model(IDS, use_cache=False).logits) and footprint == float(seen(5))
    assert footprint < 1 and not torch.allclose(logits, full_logits(lm), atol=1e-3)


def test_window_dropping_is_attention_in_a_window(lm: Backbone) -> None:
    logits, footprint = logits_and_footprint(WindowDropping(window=6, sinks=2), lm)
    with torch.no_grad(), window_attention(lm.model, 6, 2, *IDS.shape) as seen:
        assert torch.equal(logits, lm.model(IDS, use_cache=False).logits) and footprint == float(seen(5))
    assert footprint < 1 and not torch.allclose(logits, full_logits(lm), atol=1e-3)


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_gate_dropping_is_what_the_gates_decide(temperature: float | None, gates: str, lm: Backbone) -> None:
    dropping = GateDropping(gates, 0.5, temperature)
    logits, footprint = logits_and_footprint(dropping, lm)
    rule = GatedDropping(gates_for_ages(lm.model, PRICE), 0.5, temperature)
    with torch.no_grad(), rule.dropped(lm.model) as seen:
        torch.testing.assert_close(logits, lm.model(IDS, use_cache=False).logits)
        assert footprint == pytest.approx(float(seen(5)))
    assert footprint < 1 and not torch.allclose(logits, full_logits(lm), atol=1e-3)


def test_only_gates_that_are_trained_have_a_price_and_gradients(gates: str, lm: Backbone) -> None:
    fixed, trained = GateDropping(gates, 0.5, 0.5), GateDropping(gates, 0.5, 0.5, train=True)
    for dropping in (fixed, trained):
        dropping.prepare(lm)
        dropping.begin(lm, IDS)
    assert fixed.price() is None and fixed.gates is None and NoDropping().price() is None
    assert trained.price() == pytest.approx(math.exp(PRICE))
    assert trained.gates is not None and all(weight.requires_grad for weight in trained.gates.parameters())


def test_gates_that_are_trained_decide_as_before_on_standardised_keys(gates: str, lm: Backbone) -> None:
    fixed, trained = GateDropping(gates, 0.5, 0.5), GateDropping(gates, 0.5, 0.5, train=True)
    want, _ = logits_and_footprint(fixed, lm)
    trained.prepare(lm)
    trained.begin(lm, IDS)
    with torch.no_grad(), trained.inside(lm, IDS, 1.0, [0] * len(IDS)):
        torch.testing.assert_close(lm.model(IDS, use_cache=False).logits, want, atol=1e-4, rtol=1e-4)
    assert trained.gates is not None and trained.gates.key_std.min() > 0


@pytest.mark.parametrize(
    "dropping",
    [NoDropping(), RandomDropping(3, 9, False, True, "model"), WindowDropping(7, 1), GateDropping("x", 0.5, 0.2, True)],
    ids=lambda dropping: type(dropping).__name__,
)
def test_a_dropping_is_made_again_from_what_is_saved_of_it(dropping: Dropping) -> None:
    saved = dropping.to_dict()
    again = type(dropping)(**saved["init_args"])
    assert saved["class_path"] == type(dropping).__name__ and again.to_dict() == saved


def test_settings_that_mean_nothing_are_refused() -> None:
    for make in (
        lambda: WindowDropping(window=0),
        lambda: WindowDropping(sinks=-1),
        lambda: RandomDropping(recent=0),
        lambda: GateDropping(train=True),
    ):
        with pytest.raises(SmartKVError):
            make()
