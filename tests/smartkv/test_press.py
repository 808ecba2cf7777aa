"""Gates in NVIDIA's kvpress. Tests that need kvpress run by `make test-kvpress`."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from smartkv import GateBank, SmartKVError
from smartkv.models.architecture import Fingerprint, attention_modules
from smartkv.models.key_hooks import read_keys
from tests.families import make
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache.fixtures import MODELS

needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="needs kvpress: make test-kvpress")
PRESSED = ["llama", "qwen2", "qwen3", "mistral"]
AGES = (4, 16)


def gates_of(model: PreTrainedModel, ages: tuple[int, ...] = ()) -> GateBank:
    torch.manual_seed(1)
    return GateBank(Fingerprint.of(model), hidden=8, outputs=max(1, len(ages)), details={"ages": list(ages)})


def scores_in_kvpress(model: PreTrainedModel, press: Any, ids: Tensor) -> list[Tensor]:
    """The scores that the press gave in every layer of a prefill, `[kv_heads, tokens]` each."""
    scores, score = [], press.score

    def watched(module: nn.Module, *rest: Any) -> Tensor:
        scores.append(score(module, *rest)[0])
        return scores[-1][None]

    press.score = watched
    with torch.inference_mode(), press(model):
        model(input_ids=ids[None], past_key_values=DynamicCache(), use_cache=True)
    return scores


@needs_kvpress
@pytest.mark.parametrize("ages", [(), AGES])
@pytest.mark.parametrize("family", [*PRESSED, "phi3"])
def test_a_score_is_what_the_gates_say_of_the_key_and_ends_are_pinned(family: str, ages: tuple[int, ...]) -> None:
    from smartkv.press import LifespanPress

    model, ids = make(family), token_ids(40)
    bank = gates_of(model, ages)
    got = scores_in_kvpress(model, LifespanPress(0.5, bank, sinks=3, window=5), ids)
    for layer, keys in enumerate(read_keys(model, ids)):
        score = bank.score(layer, keys)[0]
        want = score[..., -1] if ages else score
        torch.testing.assert_close(got[layer][:, 3:-5], want[:, 3:-5], atol=1e-5, rtol=1e-4)
        assert (got[layer][:, :3] > 1e30).all() and (got[layer][:, -5:] > 1e30).all()


@needs_kvpress
def test_the_keys_of_the_highest_score_are_left() -> None:
    from smartkv.press import LifespanPress

    model, ids, cache = MODELS["llama"], token_ids(40), DynamicCache()
    bank, whole = gates_of(model), DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids[None], past_key_values=whole, use_cache=True)
        with LifespanPress(0.75, bank, sinks=2, window=4)(model):
            model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    for layer, keys in enumerate(read_keys(model, ids)):
        score = bank.score(layer, keys)[0]
        score[:, :2] = score[:, -4:] = torch.inf
        for head in range(2):
            kept = score[head].topk(10).indices.sort().values
            left = cache.layers[layer].keys[0, head]
            want = whole.layers[layer].keys[0, head, kept]
            assert {tuple(key.tolist()) for key in left} == {tuple(key.tolist()) for key in want}


def hidden_keys(model: PreTrainedModel) -> list[set[tuple[int, int]]]:
    """(head, position) of the keys that kvpress hides in every layer; the batch has one row."""
    hidden = []
    for module in attention_modules(model):
        _, heads, positions = module.masked_key_indices
        hidden.append(set(zip(heads.tolist(), positions.tolist(), strict=True)))
    return hidden


@needs_kvpress
@pytest.mark.parametrize("family", PRESSED)
def test_in_an_ada_kv_press_the_heads_of_a_layer_share_its_keys(family: str) -> None:
    from kvpress import AdaKVPress

    from smartkv.press import LifespanPress

    tokens, kept = 40, 20
    model, ids = MODELS[family], torch.randperm(64, generator=torch.Generator().manual_seed(0))[:tokens]  # no ties
    bank = gates_of(model)
    with torch.inference_mode(), AdaKVPress(LifespanPress(0.5, bank, sinks=2, window=4), 0.5)(model):
        model(input_ids=ids[None], past_key_values=DynamicCache(), use_cache=True)
    hidden_by_layer = hidden_keys(model)  # before another forward pass, which forgets them
    for (layer, keys), hidden in zip(enumerate(read_keys(model, ids)), hidden_by_layer, strict=True):
        score = bank.score(layer, keys)[0].detach()
        score[:, :2] = score[:, -4:] = torch.inf
        order = [sorted(range(tokens), key=lambda t, row=row: -row[t]) for row in score.tolist()]
        safe = {(head, t) for head in range(len(order)) for t in order[head][: kept // 2]}  # each head's own half
        rest = sorted(
            ((head, t) for head in range(len(order)) for t in range(tokens) if (head, t) not in safe),
            key=lambda pair: -float(score[pair]),
        )
        assert hidden == set(rest[len(order) * kept - len(safe) :])


@needs_kvpress
@pytest.mark.parametrize("ages", [(), AGES])
def test_in_a_dms_press_keys_below_the_price_go_in_the_prefill_and_while_decoding(ages: tuple[int, ...]) -> None:
    from kvpress import DMSPress

    from smartkv.press import LifespanPress

    model, ids, cache, last = MODELS["llama"], token_ids(36), DynamicCache(), 6
    bank = gates_of(model, ages)
    score = bank.score(0, read_keys(model, ids)[0])[0].detach()  # the first layer's keys know nothing of what is hidden
    score = score[..., -1] if ages else score
    figures = score.unique()
    price = float(figures[len(figures) // 2 - 1 :][:2].mean())  # no key's own
    seen = []
    with (
        torch.inference_mode(),
        DMSPress(LifespanPress(gates=bank, sinks=3, window=0), price, sliding_window_size=last, decoding=True)(model),
    ):
        for start, stop in [(0, 30), *((place, place + 1) for place in range(30, 36))]:
            model(input_ids=ids[None, start:stop], past_key_values=cache, use_cache=True)
            seen.append((stop, hidden_keys(model)))
    for stop, hidden in seen:
        want = {(h, t) for h in range(2) for t in range(3, stop - last) if float(score[h, t]) < price}
        assert hidden[0] == want


@needs_kvpress
def test_keys_without_their_hidden_states_are_refused() -> None:
    from kvpress import ComposedPress, KnormPress

    from smartkv.press import LifespanPress

    model, ids = MODELS["llama"], token_ids(40)
    composed = ComposedPress([KnormPress(0.5), LifespanPress(0.5, gates_of(model))])
    with pytest.raises(SmartKVError, match="hidden state of every key, got 40 for 20 keys"), composed(model):
        model(input_ids=ids[None], past_key_values=DynamicCache(), use_cache=True)


@needs_kvpress
@pytest.mark.parametrize("as_text", [True, False])
def test_gates_may_be_named_by_their_folder(as_text: bool, tmp_path: Path) -> None:
    from smartkv.press import LifespanPress

    bank = gates_of(MODELS["llama"])
    bank.save_pretrained(tmp_path)
    got = LifespanPress(0.5, str(tmp_path) if as_text else tmp_path).bank
    assert all(torch.equal(got.state_dict()[name], weight) for name, weight in bank.state_dict().items())


@needs_kvpress
def test_a_family_whose_keys_kvpress_cannot_read_is_refused() -> None:
    from smartkv.press import LifespanPress

    model = make("olmo2")
    with pytest.raises(SmartKVError, match="kvpress cannot read the keys of the family olmo2"):
        scores_in_kvpress(model, LifespanPress(0.5, gates_of(model)), token_ids(8))


@needs_kvpress
def test_gates_of_another_model_are_refused() -> None:
    from smartkv.press import LifespanPress

    press = LifespanPress(0.5, gates_of(MODELS["qwen3"]))
    with pytest.raises(SmartKVError, match="the gates of this press are for qwen3"), press(MODELS["llama"]):
        pass


@needs_kvpress
@pytest.mark.parametrize(
    ("wrong", "message"), [({}, "needs gates"), ({"gates": "x", "sinks": -1}, "sinks and window must be at least 0")]
)
def test_mistakes_are_told(wrong: dict[str, Any], message: str) -> None:
    from smartkv.press import LifespanPress

    with pytest.raises(SmartKVError, match=message):
        LifespanPress(0.5, **wrong)


@needs_kvpress
@pytest.mark.parametrize("family", FAMILIES)
def test_our_cache_works_where_kvpress_has_been_imported(family: str) -> None:
    """On import kvpress wraps every registered attention function."""
    script = f"""
import torch
from smartkv import HybridPolicy, LayerRule, LifespanCache
from tests.models import FAMILIES, token_ids
model, ids = FAMILIES[{family!r}](), token_ids(30)[None]
def logits():
    with torch.inference_mode():
        cache = LifespanCache(model, None, HybridPolicy((LayerRule("all", "window", 6),), sinks=2))
        return model(input_ids=ids, past_key_values=cache).logits
before = logits()
import kvpress
assert torch.equal(logits(), before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("kvpress") is not None, reason="kvpress is here")
def test_who_has_no_kvpress_is_told_how_to_get_it() -> None:
    with pytest.raises(ImportError, match=r"pip install 'smartkv\[kvpress\]'"):
        import smartkv.press  # noqa: F401
