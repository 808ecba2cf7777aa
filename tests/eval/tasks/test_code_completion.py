"""`python -m eval code_completion` on a tiny backbone."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.tasks import suite as tasks
from eval.tasks.code_completion import held_samples
from smartkv.texts.documents import Document, split_of
from tests.eval.tasks.fixtures import contenders

TEST = [str(number) for number in range(200) if split_of(str(number)) == "test"][:2]  # packages of the test split


def module(number: int, statements: int = 30) -> str:
    names = [f"amount_{'ab'[line // 26]}{chr(97 + line % 26)}" for line in range(statements)]
    lines = [f"    {name} = compute_{number}({name}, {line})" for line, name in enumerate(names)]
    return "\n".join([f"from pkg import m{number + 1}", "", f"def compute_{number}():", *lines]) + "\n"


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for package in TEST:
        (tmp_path / "code" / package).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "code" / package / f"m{number}.py").write_text(module(number))
    return tmp_path / "code"


def test_a_held_line_is_completed_by_everybody(run_task: Any, tmp_path: Path, code: Path) -> None:
    changes = {"lengths": "[600]", "samples": 3, "new_tokens": 60, "rules_protocol": "once"}
    changes["source"] = json.dumps({"name": "code", "path": str(code)})
    found = run_task("code_completion", tmp_path / "out", **changes)
    assert contenders(found) == {"full", "all-gated", "window", "all-gated+4bit", "quant:int4", "key_norm"}
    for row in found["rows"]:
        assert len(row["samples"]) == 3 and {sample["cluster"] for sample in row["samples"]} == set(TEST)
        assert all(0 <= s["similarity"] <= 1 and s["exact"] in (0.0, 1.0) and s["nll"] > 0 for s in row["samples"])
    (line,) = (line for line in found["paired"] if line["contender"] == "key_norm")
    assert line["similarity"]["samples"] == 3 and line["nll"]["difference"] != 0
    for name in ("code_completion.png", "code_completion.md"):
        assert (tmp_path / "out" / name).stat().st_size > 200


def test_the_held_line_itself_scores_in_full(
    run_task: Any, tmp_path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"nll": 1.0, "rank": 0, "right": True, "ended": True, "footprint": 1.0, "stored": 1.0, "kept": None}

    def answered(lm: Any, contender: Any, setting: Any, sample: Any, new_tokens: int) -> Any:
        line = lm.tokenizer.decode(sample.answer)
        return found | {"generated": f"\n    # said\n{line}\nmore" if sample.cluster == TEST[0] else line[:-1]}

    monkeypatch.setattr(tasks, "answered", answered)
    changes = {"lengths": "[600]", "samples": 2, "new_tokens": 60, "contenders": "[]"}
    changes["source"] = json.dumps({"name": "code", "path": str(code)})
    (full,) = run_task("code_completion", tmp_path / "out", **changes)["rows"]
    by_package = {sample["cluster"]: (sample["exact"], sample["similarity"]) for sample in full["samples"]}
    assert by_package[TEST[0]] == (1.0, 1.0)
    assert by_package[TEST[1]][0] == 0.0 and 0.9 < by_package[TEST[1]][1] < 1.0


def test_the_prompt_ends_before_the_held_line_and_begins_with_what_is_imported(lm: Any) -> None:
    suite = SimpleNamespace(lm=lm, seed=0, say=print)
    documents = [Document(f"pkg/m{number}.py", module(number)) for number in range(3)]
    samples = held_samples(suite, documents, 900, 3, 60)
    assert len(samples) == 3
    for sample in samples:
        prompt, line = lm.tokenizer.decode(sample.prompt), lm.tokenizer.decode(sample.answer)
        (number,) = (n for n in range(3) if f"compute_{n}(" in line)
        before, _, own = prompt.rpartition(f"# pkg/m{number}.py\n")
        assert own.endswith("\n") and f"{own.splitlines()[-1]}\n{line}" in module(number)
        assert 675 <= len(sample.prompt) + len(sample.answer) <= 900
        if number < 2:  # the imported file comes last
            assert f"# pkg/m{number + 1}.py" in before and before.count(f"compute_{number + 1}") > 2
    assert {sample.group[0] for sample in samples} <= {"near", "file", "others", "new"}


def test_mistakes_in_code_completion_are_told(
    run_task: Any, tmp_path: Path, code: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = json.dumps({"name": "code", "path": str(code)})
    for changes, told in (
        ({"lengths": "[100]"}, "at least 256"),
        ({"source": '{"name": "code", "path": "/nowhere"}'}, "does not exist"),
        ({"split": "validation", "source": mine}, "give more"),
        ({"lengths": "[600]", "source": mine, "contenders": '["random_pinned"]'}, "--rules_protocol once"),
        (
            {"lengths": "[600]", "source": mine, "contenders": '["random_pinned"]', "rules_protocol": "once"},
            "which tokens",
        ),
    ):
        with pytest.raises(SystemExit):
            run_task("code_completion", tmp_path, **changes)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and told in error and error.count("\n") == 1
