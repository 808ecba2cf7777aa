"""`python -m eval ruler` on a tiny backbone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.tasks import suite as tasks
from eval.tasks.ruler import _samples
from eval.tasks.ruler_generator import FAMILIES
from tests.eval.tasks.test_ruler_generator import many_words


def test_ruler_runs_all_families_and_scores_what_is_generated(run_task: Any, tmp_path: Path) -> None:
    changes = {"lengths": "[2400]", "samples": 1, "contenders": '["all-gated", "window"]'}
    found = run_task("ruler", tmp_path, **changes)
    for row in found["rows"]:
        assert [sample["group"][0] for sample in row["samples"]] == list(FAMILIES)
        assert all(0 <= sample["score"] <= 1 and sample["nll"] > 0 for sample in row["samples"])
    assert (tmp_path / "ruler_score.png").is_file() and (tmp_path / "ruler_nll.png").is_file()


def test_published_rules_generate_and_the_full_cache_is_measured_once_for_both_questions(
    run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["all-gated", "random_pinned", "snapkv"]
    changes = {"lengths": "[2400]", "samples": 1, "families": '["niah_single_2", "fwe"]', "rules_protocol": "once"}
    changes["contenders"] = json.dumps(names)
    known = run_task("ruler", tmp_path, **changes)
    asked, plain = list[tuple[str, Any]](), tasks.answered

    def heard(lm: Any, contender: Any, setting: Any, sample: Any, new_tokens: int) -> Any:
        asked.append((contender.name, sample))
        return plain(lm, contender, setting, sample, new_tokens)

    monkeypatch.setattr(tasks, "answered", heard)
    held = run_task("ruler", tmp_path, **changes, question="held_back")
    assert sorted(name for name, _ in asked) == sorted(2 * names)
    for _, sample in asked:
        assert sample.held_back and sample.compressed == sample.text[1] < len(sample.prompt) - 40
    for found in (known, held):
        for row in found["rows"]:
            assert all(sample["generated"] is not None for sample in row["samples"])
            if row["contender"] in ("random_pinned", "snapkv"):
                stored = [sample["stored"] for sample in row["samples"]]
                assert all(abs(share - 0.5) < (0.02 if found is known else 0.15) for share in stored)
    gates = [[row for row in found["rows"] if row["contender"] == "all-gated"] for found in (known, held)]
    for before, after in zip(gates[0][0]["samples"], gates[1][0]["samples"], strict=True):
        assert before["nll"] == pytest.approx(after["nll"], abs=1e-3)  # gates never knew the question


def test_the_text_of_a_task_lies_between_instruction_and_question(lm: Any, long_texts: Path) -> None:
    texts = [torch.tensor(lm.tokenizer(many_words(400, 1))["input_ids"][:2400])]
    suite = SimpleNamespace(lm=lm, seed=0)
    for family in FAMILIES:
        (sample,) = _samples(suite, texts, family, 2400, False, True)
        before, text, after = (
            lm.tokenizer.decode(part)
            for part in (
                sample.prompt[: sample.text[0]],
                sample.prompt[slice(*sample.text)],
                sample.prompt[sample.text[1] :],
            )
        )
        if family.startswith("niah"):
            assert "I will quiz you about" in before and "What " in after and " is: " not in after
        elif family == "fwe":
            assert before.endswith("coded words. ") and "Do not provide any explanation" in after
        else:
            assert before.count("Question: ") == 1 and after.count("Question: ") == 1  # the example stays
        assert all(answer in text for answer in sample.references) and len(text) > 600


def test_mistakes_in_ruler_are_told(run_task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({"lengths": "[200]"}, {"families": '["qa"]'}, {"lengths": "[6000]", "samples": 1}):
        with pytest.raises(SystemExit):
            run_task("ruler", tmp_path, **changes)
        assert capsys.readouterr().err.startswith("error: ")
