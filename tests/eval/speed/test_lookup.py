"""`python -m eval lookup` on a tiny backbone: drafts are counted right, and the figures hang together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from eval.__main__ import main
from eval.speed.lookup import _generate
from smartkv import GateBank, LifespanCache
from tests.lightning_fixtures import write_texts
from tests.models import token_ids


def run_lookup(folder: Path, backbone: Path, **changes: Any) -> dict[str, Any]:
    source = {"name": "mine", "path": str(write_texts(folder / "texts", splits=["test"]))}
    settings = {
        "out": folder,
        "backbone": backbone,
        "dtype": "float32",
        "texts": json.dumps([{"name": "books", "windows": 2, "sources": [source]}]),
        "context": 128,
        "new_tokens": 24,
        "footprints": "[0.5]",
        "draft": 4,
        "threads": 1,
    } | changes
    main(["lookup", *(part for name, value in settings.items() for part in (f"--{name}", str(value)))])
    return json.loads((folder / "lookup.json").read_text())


def test_each_cache_is_measured_with_and_without_lookup(tmp_path: Path, tiny_backbone: Path) -> None:
    rows = run_lookup(tmp_path, tiny_backbone)["rows"]
    assert [row["contender"] for row in rows] == ["full", "gates@budget 0.5"]
    for row in rows:
        assert row["prompts"] == 2 and row["same"] == 1
        assert row["greedy"] > 0 < row["lookup"] and row["speedup"] > 0
        assert 1 <= row["tokens_per_call"] <= 5 and 0 <= row["acceptance"] <= 1
    assert "SmartKV gates, budget, 0.5" in (tmp_path / "lookup.md").read_text()


@pytest.mark.parametrize(("evicting", "seed"), [*((True, seed) for seed in range(8)), (False, 0)])
def test_drafts_are_counted_as_they_are_in_a_plain_loop(evicting: bool, seed: int, lm: Any) -> None:
    prompt, draft, new_tokens = token_ids(8, 1).repeat(16), 3, 20
    torch.manual_seed(seed)
    gates = GateBank(lm.fingerprint)

    def cache() -> Any:
        return LifespanCache(lm.model, gates, footprint=0.6) if evicting else DynamicCache()

    plain, looked = (_generate(lm, cache(), prompt, new_tokens, each) for each in (None, draft))
    assert plain.ids == looked.ids and (plain.calls, plain.drafted, plain.accepted) == (new_tokens - 1, 0, 0)
    assert looked.calls == new_tokens - 1 - looked.accepted
    # what is drafted: what follows the first place of the longest of the last two tokens' n-grams
    text, drafted, accepted = prompt.tolist(), 0, 0
    while len(text) < len(prompt) + new_tokens:
        proposed: list[int] = []
        for length in (2, 1):
            places = [at for at in range(len(text) - length) if text[at : at + length] == text[-length:]]
            if places:
                proposed = text[places[0] + length : places[0] + length + draft]
                break
        wanted = plain.ids[len(text) - len(prompt) :]
        proposed = proposed if len(wanted) > 1 else []
        pairs = list(zip(proposed, wanted[:-1], strict=False))
        right = next((n for n, (said, token) in enumerate(pairs) if said != token), len(pairs))
        drafted, accepted = drafted + len(proposed), accepted + right
        text += wanted[: right + 1]
    assert looked.accepted == accepted and looked.drafted == drafted


def test_the_cache_is_detached_and_nothing_is_counted_later(lm: Any) -> None:
    _generate(lm, LifespanCache(lm.model, GateBank(lm.fingerprint), footprint=0.6), token_ids(100), 4, 2)
    assert not lm.model._forward_pre_hooks
    with torch.no_grad():
        lm.model(token_ids(4)[None])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": "[]"}, "give at least one kind"),
        ({"footprints": "[0]"}, "above 0 and at most 1"),
        ({"draft": 0}, "draft and threads must be at least 1"),
        ({"new_tokens": 1}, "new_tokens at least 2"),
        ({"new_tokens": 500}, "are more than the model's 512 positions"),
    ],
)
def test_a_mistake_is_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_lookup(tmp_path, tiny_backbone, **changes)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and said in error
