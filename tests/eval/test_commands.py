"""`python -m eval …` as a user types it, on a tiny backbone."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main
from tests.lightning_fixtures import ROOT

PNG = b"\x89PNG"


def run_eval(*args: str | Path) -> None:
    main([str(arg) for arg in args])


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_eval("gates", "--gates", tmp_path / "none", "--shards", tmp_path, "--out", tmp_path / "out")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gates") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "says"),
    [("benchmark_kv.py --help", "perplexity"), ("explore_model.py --help", "calibrate"),
     ("generate_dataset.py --help", "--num_samples"), ("train_mlps.py --help", "--batch_size"),
     ("export_heads.py --help", "{shards,gates}"), ("train_eit.py --help", "--keep_ratio_start")],
)  # fmt: skip
def test_the_old_scripts_answer(script: str, says: str) -> None:
    name, *args = script.split()
    command = [sys.executable, str(ROOT / "scripts" / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, cwd="/")
    assert says in done.stdout + done.stderr


@pytest.mark.parametrize("phase", ["0", "1", "2"])
def test_the_slurm_scripts_say_what_they_would_send_and_skip_what_is_done(phase: str, tmp_path: Path) -> None:
    submit = ROOT / "scripts/slurm/submit.sh"
    env = os.environ | {"DRY_RUN": "1", "OUT": str(tmp_path), "MODELS": "Qwen/Qwen3-8B"}
    said = subprocess.run(["bash", str(submit), phase], capture_output=True, text=True, env=env, check=True).stdout
    assert "would send: phase" in said and "would run: python" in said
    command = said.split("would run: python ")[1]
    assert command.startswith(("-m eval ", "main.py fit"))
    done = {"0": ["anchors/anchors.json"], "1": ["base/compare.json"]}
    if phase in done:
        for number, name in enumerate(done[phase]):
            path = tmp_path / "Qwen_Qwen3-8B" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.utime(path, (1e9 + number, 1e9 + number))
        said = subprocess.run(["bash", str(submit), phase], capture_output=True, text=True, env=env, check=True).stdout
        assert "done already" in said and "would run" not in said


def test_no_more_jobs_than_allowed_are_sent_and_none_where_the_queue_is_not_known(tmp_path: Path) -> None:
    for name, body in {"squeue": "exit 1", "sbatch": f"echo sent >> {tmp_path}/sent"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "OUT": str(tmp_path / "out"),
        "MODELS": "Qwen/Qwen3-8B",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "scripts/slurm/submit.sh"), "1"]
    failed = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert failed.returncode and "squeue does not answer" in failed.stderr and not (tmp_path / "sent").exists()
    (tmp_path / "squeue").write_text("#!/bin/sh\necho another-job\n")
    subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert (tmp_path / "sent").read_text() == "sent\n" and (tmp_path / "out").is_dir()
    (tmp_path / "squeue").write_text("#!/bin/sh\necho smartkv-1-Qwen_Qwen3-8B\n")
    said = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
    assert "sent already" in said and (tmp_path / "sent").read_text() == "sent\n"


def test_a_phase_of_several_commands_is_sent_every_time_that_something_is_left(tmp_path: Path) -> None:
    for name, body in {"squeue": "true", "sbatch": f"echo sent >> {tmp_path}/sent", "python": "true"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {
        "OUT": str(tmp_path / "out"),
        "MODELS": "Qwen/Qwen3-8B",
        "PRESSES_PYTHON": "python",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    command = ["bash", str(ROOT / "scripts/slurm/submit.sh"), "1"]
    for _ in range(20):  # a pipe that is closed early kills who writes into it, now and then
        subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert (tmp_path / "sent").read_text() == "sent\n" * 20


def test_a_phase_that_cannot_be_planned_is_an_error_and_one_without_an_adapter_is_not_sent(tmp_path: Path) -> None:
    for name in ("squeue", "sbatch"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"OUT": str(tmp_path / "out"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    submit = ["bash", str(ROOT / "scripts/slurm/submit.sh")]
    unknown = subprocess.run(
        [*submit, "2"], capture_output=True, text=True, env=env | {"MODELS": "foo/bar"}, check=False
    )
    assert unknown.returncode and "no config for 'foo/bar'" in unknown.stderr
    untrained = subprocess.run(
        [*submit, "3"], capture_output=True, text=True, env=env | {"MODELS": "Qwen/Qwen3-8B"}, check=True
    )
    assert "nothing to do" in untrained.stdout and not (tmp_path / "called").exists()


def test_the_slurm_scripts_are_bash_and_refuse_an_unknown_phase() -> None:
    scripts = sorted((ROOT / "scripts/slurm").glob("*.sh"))
    assert len(scripts) == 7
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
    env = os.environ | {"DRY_RUN": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/slurm/submit.sh"), "7"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 2 and "there is no phase '7'" in done.stderr


@pytest.mark.parametrize("name", ["fit.sh", "phase2_train.sh"])
def test_a_slurm_script_finds_the_checkout_from_where_slurm_copies_it(name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / "scripts/slurm" / name, tmp_path / "slurm_script"))
    args = ["fit", "-c", "configs/gates/smollm2.yaml"] if name == "fit.sh" else ["smollm2-135m"]
    env = os.environ | {"DRY_RUN": "1", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(["bash", str(copy), *args], capture_output=True, text=True, env=env, check=True, cwd="/")
    assert "main.py fit -c configs/" in done.stdout and "--ckpt_path last" in done.stdout
    if name == "fit.sh":
        assert "--trainer.num_nodes 2 --trainer.devices 8" in done.stdout


@pytest.mark.parametrize("command", ["anchors", "compare", "reasoning"])
def test_a_source_that_cannot_be_had_is_said_by_every_command(
    command: str,
    tiny_backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("SMARTKV_DATA", raising=False)
    origins = '["local", "builtin"]'
    book = f'[{{"name": "pg19", "origins": {origins}}}]'
    options = {
        "anchors": ["--sources", book, "--windows", "1", "--window", "64", "--recent", "8", "--split", "train"],
        "compare": [
            "--texts",
            f'[{{"name": "t", "sources": {book}, "windows": 1}}]',
            "--calibration",
            book,
            "--recall.trials",
            "0",
            "--contenders",
            '["window"]',
            "--footprints",
            "[0.5]",
            "--calibration_windows",
            "1",
            "--window",
            "128",
            "--score_from",
            "64",
        ],
        "reasoning": ["--sets", '["gsm8k"]', "--origins", '["local"]'],
    }[command]
    with contextlib.suppress(SystemExit):  # `reasoning` has no problems then, and ends; the two others go on
        main([command, "--out", str(tmp_path), "--backbone", str(tiny_backbone), "--dtype", "float32", *options])
    said = capsys.readouterr()
    assert "cannot be had" in (said.out + said.err).lower()
