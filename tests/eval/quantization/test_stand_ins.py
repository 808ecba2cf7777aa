"""Models of `python -m eval baselines`, and what stands in for a GPT-2 that cannot be had."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.quantization import stand_ins
from eval.quantization.stand_ins import Shape, load_or_stand_in, shape_of
from smartkv.errors import SmartKVError


@pytest.fixture
def nothing_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any) -> Any:
        raise SmartKVError("no network\nand no cache")

    monkeypatch.setattr(stand_ins, "load_backbone", load)
    monkeypatch.setitem(stand_ins.SHAPES, "gpt2", Shape(2, 2, 16))


def test_the_shape_of_a_known_model_is_known_without_its_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_ins, "read_architecture", lambda *_: pytest.fail("a config was read"))
    assert shape_of("gpt2") == Shape(12, 12, 64)


def test_the_shape_of_another_model_is_that_of_its_config(tiny_backbone: Path) -> None:
    assert shape_of(str(tiny_backbone)) == Shape(2, 2, 8)


def test_a_model_that_can_be_had_is_the_model(tiny_backbone: Path) -> None:
    loaded = load_or_stand_in(str(tiny_backbone), "float32", "cpu", 0)
    assert loaded.stand_in is None and Shape.of(loaded.lm.architecture) == Shape(2, 2, 8)


@pytest.mark.usefixtures("nothing_to_load")
def test_random_weights_stand_in_for_a_gpt2_and_say_so() -> None:
    first, second = (load_or_stand_in("gpt2", "float32", "cpu", seed) for seed in (0, 0))
    assert first.stand_in is not None and "no network)" in first.stand_in
    assert Shape.of(first.lm.architecture) == Shape(2, 2, 16)
    assert all(map(torch.equal, first.lm.model.parameters(), second.lm.model.parameters()))


@pytest.mark.usefixtures("nothing_to_load")
def test_the_stand_in_s_tokenizer_has_every_byte() -> None:
    tokenizer = load_or_stand_in("gpt2", "float32", "cpu", 0).lm.tokenizer
    assert tokenizer.decode(tokenizer("a river, 12 · ß")["input_ids"]) == "a river, 12 · ß"


@pytest.mark.usefixtures("nothing_to_load")
@pytest.mark.parametrize("model", ["someone/model", "gpt2-huge"])
def test_nothing_stands_in_for_another_model(model: str) -> None:
    with pytest.raises(SmartKVError, match="no network"):
        load_or_stand_in(model, "float32", "cpu", 0)


def test_a_wrong_dtype_is_no_reason_for_a_stand_in() -> None:
    with pytest.raises(SmartKVError, match="float3"):
        load_or_stand_in("gpt2", "float3", "cpu", 0)
