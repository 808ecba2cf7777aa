"""`python -m eval reasoning` on a tiny backbone."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval.tasks import suite as tasks
from eval.tasks.answers import Sample
from eval.tasks.metrics import same_answer
from eval.tasks.reasoning import first_solution
from tests.eval.tasks.fixtures import ALL, contenders


def written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems of GSM8K; validation takes some of train's."""
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        records = ({"question": f"What is {n} + 2 in {split}?", "answer": f"It is\n#### {n + 2}"} for n in range(20))
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setenv("SMARTKV_DATA", str(folder))


def test_reasoning_reads_problems_that_were_never_harvested(
    run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, monkeypatch)
    changes = {"sets": '["gsm8k"]', "samples": 2, "shots": 1, "new_tokens": 4}
    found = run_task("reasoning", tmp_path / "out", **changes)
    assert contenders(found) == ALL
    for row in found["rows"]:
        assert len(row["samples"]) == 2 and all(sample["nll"] > 0 for sample in row["samples"])
        scores = {sample["score"] for sample in row["samples"]}
        assert scores == {None} if row["contender"] == "key_norm" else scores <= {0.0, 1.0}


def test_sets_are_checked_before_any_is_measured(
    run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text(json.dumps({"question": "How many?", "answer": "4"}))
    (tmp_path / "math").mkdir()
    records = ({"id": n, "problem": f"p{n}", "solution": "so " * 2000} for n in range(30))
    (tmp_path / "math" / "aime24.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    with pytest.raises(SystemExit):
        run_task("reasoning", tmp_path / "out", sets='["gsm8k", "aime24"]', shots=0, new_tokens=2)
    assert "positions" in capsys.readouterr().err
    assert not (tmp_path / "out" / "reasoning.cells").exists()


def test_a_right_solution_scores_and_a_wrong_one_does_not(
    run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, monkeypatch)
    found = {"nll": 1.0, "rank": 0, "right": True, "ended": True, "footprint": 1.0, "stored": 1.0, "kept": None}
    monkeypatch.setattr(tasks, "answered", lambda *_: found | {"generated": "so\n#### $3\n\nQuestion: and 4?"})
    changes = {"sets": '["gsm8k"]', "samples": 3, "shots": 0, "new_tokens": 9, "contenders": "[]"}
    (full,) = run_task("reasoning", tmp_path / "out", **changes)["rows"]
    assert [sample["score"] for sample in full["samples"]] == [0.0, 1.0, 0.0]  # 0 + 2, 1 + 2, 2 + 2


def test_a_chat_has_solved_problems_as_earlier_turns_and_needs_no_likelihood(
    run_task: Any, tmp_path: Path, long_chatty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, monkeypatch)
    asked: list[str] = []
    plain = tasks.answered

    def heard(lm: Any, contender: Any, setting: Any, sample: Sample, new_tokens: int) -> Any:
        asked.append(lm.tokenizer.decode(sample.prompt))
        return plain(lm, contender, setting, sample, new_tokens)

    monkeypatch.setattr(tasks, "answered", heard)
    changes = {"sets": '["gsm8k"]', "samples": 2, "shots": 1, "new_tokens": 4, "contenders": '["window"]'}
    chat = {"chat": "true", "instruction": " Box it.", "likelihood": "false", "backbone": long_chatty}
    found = run_task("reasoning", tmp_path / "out", **changes, **chat)
    shown = re.fullmatch(
        r"<user>What is (\d+) \+ 2 in train\? Box it\.\n<assistant>It is\n#### \d+\n"
        r"<user>What is (\d+) \+ 2 in test\? Box it\.\n<assistant>",
        asked[0],
    )
    assert shown is not None
    for row in found["rows"]:
        assert all(sample["nll"] is None and sample["score"] in (0.0, 1.0) for sample in row["samples"])
    (line,) = found["paired"]
    assert line["score"]["samples"] == 2 and "nll" not in line
    assert "NLL" not in (tmp_path / "out/reasoning.md").read_text()


def test_a_solution_ends_at_gsm8k_s_last_line_and_not_at_a_heading() -> None:
    assert first_solution("so 3\n#### 1,250\nQuestion: next", "gsm8k") == "so 3\n#### 1,250"
    chatty = "#### 1. Add\n1 + 2 = 3\n#### 2. Say\nIt is \\boxed{3}."
    assert first_solution(chatty, "gsm8k") == chatty
    assert same_answer(chatty, "1 + 2\n#### 3") == 1.0 and same_answer(chatty, "#### 1") == 0.0


def test_problems_of_the_train_split_are_not_asked_after_their_own_solutions(
    run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, monkeypatch)
    asked: list[str] = []
    plain = tasks.answered

    def heard(lm: Any, contender: Any, setting: Any, sample: Sample, new_tokens: int) -> Any:
        asked.append(lm.tokenizer.decode(sample.prompt))
        return plain(lm, contender, setting, sample, new_tokens)

    monkeypatch.setattr(tasks, "answered", heard)
    changes = {"sets": '["gsm8k"]', "samples": 2, "shots": 1, "new_tokens": 0, "contenders": "[]", "split": "train"}
    run_task("reasoning", tmp_path / "out", **changes)
    one, other = ([part.split()[0] for part in text.split("What is ")[1:]] for text in asked)  # shown, asked
    assert one[0] == other[0] and len({*one, *other}) == 3


def test_a_footprint_out_of_reach_of_short_problems_is_left_out_of_means_with_long_ones(
    run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "math").mkdir()
    sizes = enumerate((3, 300) * 30)  # words
    records = ({"problem": f"p{n}", "solution": "so " * size, "unique_id": str(n)} for n, size in sizes)
    (tmp_path / "math" / "math500.jsonl").write_text("\n".join(map(json.dumps, records)))
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    policy = tmp_path / "policy.yaml"
    policy.write_text("{name: mine, sinks: 40, rules: [{layers: all, rule: gated, window: 16}], price: null}")
    named = {"contenders": json.dumps([str(policy), "window"]), "footprints": "[0.12]"}
    found = run_task("reasoning", tmp_path / "out", sets='["math500"]', shots=0, new_tokens=0, samples=4, **named)
    lengths = {name: [row["length"] for row in found["rows"] if row["contender"] == name] for name in ("full", "mine")}
    assert len(lengths["full"]) == 2 and lengths["mine"] == lengths["full"][1:]
    assert "left out" in capsys.readouterr().out
    (line,) = (line for line in (tmp_path / "out/reasoning.md").read_text().splitlines() if line.startswith("| mine"))
    assert line.strip(" |") == "mine"  # no means
