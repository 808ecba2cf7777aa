"""The runner that all tasks share: resuming, configs, devices."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval.tasks import suite as tasks
from smartkv.policies.budgets import Calibration
from tests.eval.tasks.fixtures import ALL, contenders

ROOT = Path(__file__).parents[3]


def test_a_killed_run_goes_on_where_it_stopped(run_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"lengths": "[400]", "depths": 2, "samples": 1, "new_tokens": 0, "contenders": '["window"]'}
    plain, calls = tasks.answered, []

    def stops(*args: Any) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return plain(*args)

    monkeypatch.setattr(tasks, "answered", stops)
    with pytest.raises(SystemExit):  # after the line that says how to go on
        run_task("needle", tmp_path, **changes)
    monkeypatch.setattr(tasks, "answered", lambda *args: calls.append(1) or plain(*args))
    monkeypatch.setattr(Calibration, "measure", None)  # prices are known
    found = run_task("needle", tmp_path, **changes)
    assert len(calls) == 4 == sum(len(row["samples"]) for row in found["rows"])


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("needle", {"lengths": "[400]", "depths": 1, "samples": 1, "new_tokens": 2}),
        ("ruler", {"lengths": "[2400]", "samples": 1, "families": '["niah_single_2"]'}),
        ("longbench", {"tasks": '["trec"]', "samples": 1, "longest": 300, "new_tokens": 2}),
        ("reasoning", {"sets": '["math500"]', "samples": 1, "shots": 1, "new_tokens": 2}),
        ("needle_qwen", {"lengths": "[400]", "depths": 1, "samples": 1, "new_tokens": 2}),
        ("ruler_qwen", {"lengths": "[1600]", "samples": 1, "families": '["fwe"]'}),
        ("ruler_qwen_rules", {"lengths": "[1600]", "samples": 1, "families": '["fwe"]', "question": "held_back"}),
        ("reasoning_qwen", {"sets": '["math500"]', "samples": 1, "new_tokens": 40}),
        ("code_completion", {"lengths": "[300]", "samples": 1, "new_tokens": 60}),
    ],
)
def test_the_config_runs(
    command: str,
    changes: dict[str, Any],
    run_task: Any,
    tmp_path: Path,
    longbench_data: Path,
    long_chatty: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ROOT / f"configs/eval/{command}.yaml"
    written, command = yaml.safe_load(config.read_text()), command.partition("_qwen")[0]
    assert str(config.relative_to(ROOT)) in config.read_text().split("\n")[0]
    problems = [{"problem": f"{n} + 2?", "solution": f"$\\boxed{{{n + 2}}}$", "unique_id": str(n)} for n in range(40)]
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "math500.jsonl").write_text("\n".join(map(json.dumps, problems)))
    monkeypatch.setenv("SMARTKV_DATA", str(tmp_path))
    names = [name.replace("gates", "all-gated") for name in written["contenders"]]
    more: dict[str, Any] = {"data": longbench_data} if command == "longbench" else {}
    if written.get("chat"):
        more["backbone"] = long_chatty
    found = run_task(command, tmp_path / "out", config=config, contenders=json.dumps(names), **changes, **more)
    assert contenders(found) == {"full", *names}
    assert set(written) >= set(found["arguments"]) & {"gates", "contenders", "footprints", "seed", "split"}


@pytest.mark.gpu
def test_tasks_on_the_gpu_find_what_they_find_on_the_cpu(run_task: Any, tmp_path: Path) -> None:
    named = [*ALL - {"full"}, "quant:kivi", "quant:adaptive_gates", "h2o"]
    changes = {"lengths": "[400]", "depths": 2, "samples": 1, "new_tokens": 4, "contenders": json.dumps(named)}
    cpu, gpu = (run_task("needle", tmp_path / name, device=name, **changes) for name in ("cpu", "cuda"))
    assert contenders(gpu) == contenders(cpu) == {"full", *named}
    for mine, theirs in zip(gpu["rows"], cpu["rows"], strict=True):
        packed = mine["kind"] == "quantised" or "bit" in mine["contender"]  # a rounding that falls the other way
        for one, other in zip(mine["samples"], theirs["samples"], strict=True):
            assert one["nll"] == pytest.approx(other["nll"], abs=0.05 if packed else 5e-3), mine["contender"]
            assert one["footprint"] == pytest.approx(other["footprint"], abs=0.01)
