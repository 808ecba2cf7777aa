"""Contenders by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.contenders.registry import make_contenders, names_or_default
from smartkv import GateBank
from smartkv.baselines.oracles import oracle_labels
from tests.models import token_ids

WINDOW, FIRST = 64, 20


def test_the_oracle_s_scores_are_what_is_to_come_and_the_null_s_what_was(tiny_lm: Any, random_gates: Path) -> None:
    windows = [token_ids(WINDOW, 1), token_ids(WINDOW, 2)]
    gates = GateBank.from_pretrained(random_gates)
    names = ["oracle:attention", "oracle:lifespan", "null:constant"]
    _, attention, lifespan, constant = make_contenders(names, tiny_lm, gates, windows, FIRST)
    want = oracle_labels(tiny_lm.model, windows[1], 32)
    torch.testing.assert_close(attention.tables[1], want.attention)
    torch.testing.assert_close(lifespan.tables[1], want.lifespan.float().log2() / 2)
    half = torch.stack([oracle_labels(tiny_lm.model, w, 32).lifespan[..., : WINDOW // 2] for w in windows])
    half = half.clamp(max=WINDOW // 2).float().log2() / 2
    torch.testing.assert_close(constant.tables[0][..., 0], half.mean(dim=(0, 3)))
    assert constant.tables[0].std(dim=-1).max() < 1e-6


WRONG = {
    "all-gatd": "policy 'all-gatd' is neither one of",
    "null:nothing": "there is no contender 'null:nothing'",
    "oracle:delphi": "there is no contender 'oracle:delphi'",
    "quant:int5": "there is no scheme 'int5'",
    "quant:kivi@many": "has no number of tokens after '@'",
    "quant:kivi@-1": "has no number of tokens after '@'",
    "window+9bit": "bits",
    "press:knorm": "it is for --protocol once",
    "gates": "there are none: give --gates",
    "gates@budget": "there are none: give --gates",
    "window@budget": "needs a policy that leaves its price open, 'window' leaves window open: expected gates@budget",
    "gates@budget+pinned": "it is for the tasks needle, ruler and reasoning",
    "random@budget+pinned": "it is for the tasks needle, ruler and reasoning",
    "random@budget+9bit": "bits",
    "all-gated": "but no gates were given",
    "quant:adaptive_gates": "needs gates: give --gates",
}
COMMANDS = ["compare", "needle", "ruler", "longbench", "reasoning"]


@pytest.mark.parametrize(
    ("command", "name"), [*(("compare", name) for name in WRONG), *((command, "all-gatd") for command in COMMANDS[1:])]
)
def test_a_wrong_name_is_told_before_model_and_texts_are_loaded(
    command: str,
    name: str,
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("eval.common.options.load_backbone", lambda *_: pytest.fail("the model was loaded"))
    options = ["--out", str(tmp_path), "--backbone", str(tiny_backbone), "--contenders", f'["window", "{name}"]']
    with pytest.raises(SystemExit) as stop:
        main([command, *options])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and WRONG[name] in said and said.count("\n") == 1


@pytest.mark.parametrize(("command", "option"), [("perplexity", '["all-gatd"]'), ("decode", "all-gatd")])
def test_a_wrong_policy_is_told_before_model_and_texts_are_loaded(
    command: str,
    option: str,
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("eval.common.options.load_backbone", lambda *_: pytest.fail("the model was loaded"))
    name = "--policies" if command == "perplexity" else "--policy"
    with pytest.raises(SystemExit):
        main([command, "--out", str(tmp_path), "--backbone", str(tiny_backbone), name, option])
    assert WRONG["all-gatd"] in capsys.readouterr().err


def test_without_gates_the_default_names_none_that_needs_a_policy_stored_with_them() -> None:
    assert names_or_default(None, ("gates", "window"), None) == ["window"]
    assert names_or_default(None, ("gates", "window"), "some") == ["gates", "window"]
    assert names_or_default(["gates"], ("window",), None) == ["gates"]
