"""Pieces of work that are timed."""

from pathlib import Path

import pytest

from cli.recipe import timing
from cli.recipe.settings import SIZES
from smartkv.models.backbone import load_backbone
from tests.families import save_family

AMOUNTS = SIZES["tiny"].within(256)


@pytest.mark.parametrize("form", ["phi3", "gemma3_text, sliding"])
def test_each_kind_of_work_is_done_once_and_leaves_the_model_as_it_was(form: str, tmp_path: Path) -> None:
    lm = load_backbone(str(save_family(tmp_path, form)), "float32")
    before = {name: parameter.clone() for name, parameter in lm.model.named_parameters()}
    seconds = timing.time_work(lm, AMOUNTS, scored=64)
    assert set(seconds) == {"harvest", "gates", "forward", "report", "distilled"}
    assert min(seconds.values()) > 0
    assert all(parameter.equal(before[name]) for name, parameter in lm.model.named_parameters())
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_a_backbone_is_checked_and_timed_and_a_large_vocabulary_scored_less(
    tiny_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = timing.time_backbone(str(tiny_backbone), "float32", "cpu", False, AMOUNTS)
    assert (seen["site"], seen["scored_tokens"], seen["gpu_bytes"]) == ("k_proj", 512, 0)
    monkeypatch.setattr(timing, "BIG_VOCABULARY", 100)
    assert timing.time_backbone(str(tiny_backbone), "float32", "cpu", False, AMOUNTS)["scored_tokens"] == 256
