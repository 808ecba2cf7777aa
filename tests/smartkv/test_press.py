"""Gates in NVIDIA's kvpress. What needs kvpress runs by `make test-kvpress`."""

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from smartkv import GateBank, SmartKVError
from smartkv.attention import read_keys
from smartkv.backbones import Fingerprint
from tests.models import FAMILIES, token_ids
from tests.smartkv.cache_fixtures import MODELS

needs_kvpress = pytest.mark.skipif(find_spec("kvpress") is None, reason="needs kvpress: make test-kvpress")
PRESSED = ["llama", "qwen2", "qwen3", "mistral"]
AGES = (4, 16)


def gates_of(model: PreTrainedModel, ages: tuple[int, ...] = ()) -> GateBank:
    torch.manual_seed(1)
    return GateBank(Fingerprint.of(model), hidden=8, outputs=max(1, len(ages)), details={"ages": list(ages)})


def scores_in_kvpress(model: PreTrainedModel, press: Any, ids: Tensor) -> list[Tensor]:
    """What the press said of every layer in a prefill, `[kv_heads, tokens]` each."""
    found, score = [], press.score

    def watched(module: nn.Module, *rest: Any) -> Tensor:
        found.append(score(module, *rest)[0])
        return found[-1][None]

    press.score = watched
    with torch.inference_mode(), press(model):
        model(input_ids=ids[None], past_key_values=DynamicCache(), use_cache=True)
    return found


@needs_kvpress
@pytest.mark.parametrize("ages", [(), AGES])
@pytest.mark.parametrize("family", PRESSED)
def test_a_score_is_what_the_gates_say_of_the_key_and_ends_are_pinned(family: str, ages: tuple[int, ...]) -> None:
    from smartkv.press import LifespanPress

    model, ids = MODELS[family], token_ids(40)
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


@needs_kvpress
def test_gates_of_another_model_are_refused() -> None:
    from smartkv.press import LifespanPress

    press = LifespanPress(0.5, gates_of(MODELS["qwen3"]))
    with pytest.raises(SmartKVError, match="the gates of this press are for qwen3"), press(MODELS["llama"]):
        pass


@needs_kvpress
@pytest.mark.parametrize(
    ("wrong", "said"), [({}, "needs gates"), ({"gates": "x", "sinks": -1}, "sinks and window must be at least 0")]
)
def test_mistakes_are_told(wrong: dict[str, Any], said: str) -> None:
    from smartkv.press import LifespanPress

    with pytest.raises(SmartKVError, match=said):
        LifespanPress(0.5, **wrong)


@needs_kvpress
@pytest.mark.parametrize("family", FAMILIES)
def test_our_cache_works_where_kvpress_has_been_imported(family: str) -> None:
    """It wraps every attention function that is registered when it is imported."""
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
