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
    assert set(seconds) == {"harvest", "gates", "forward", "report", "distilled", "peak_bytes"}
    assert min(seconds.values()) > 0 and seconds["peak_bytes"] > 10_000_000
    assert all(parameter.equal(before[name]) for name, parameter in lm.model.named_parameters())
    assert all(parameter.grad is None for parameter in lm.model.parameters())
