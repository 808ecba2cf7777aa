"""`python -m eval …` as a user types it, on a tiny backbone."""

import contextlib
import json
import os
import shutil
import subprocess
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


def slurm(folder: Path, **variables: str) -> dict[str, str]:
    """An environment in which the SLURM scripts write, and look for results, below `folder` alone."""
    return os.environ | {"OUT": str(folder / "out"), "ADAPTERS": str(folder / "adapters")} | variables


@pytest.mark.parametrize("phase", ["0", "1", "2"])
def test_the_slurm_scripts_say_what_they_would_send_and_skip_what_is_done(phase: str, tmp_path: Path) -> None:
    submit = ROOT / "scripts/slurm/submit.sh"
    env = slurm(tmp_path, DRY_RUN="1", MODELS="Qwen/Qwen3-8B")
    said = subprocess.run(["bash", str(submit), phase], capture_output=True, text=True, env=env, check=True).stdout
    assert "would send: phase" in said and "would run: python" in said
    command = said.split("would run: python ")[1]
    assert command.startswith(("-m eval ", "main.py fit"))
    done = {
        "0": "out/Qwen_Qwen3-8B/anchors/anchors.json",
        "1": "out/Qwen_Qwen3-8B/base/compare.json",
        "2": "adapters/qwen3-8b/final/training.json",
    }[phase]
    (tmp_path / done).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / done).touch()
    said = subprocess.run(["bash", str(submit), phase], capture_output=True, text=True, env=env, check=True).stdout
    assert "done already" in said and "would run" not in said


def dry(script: str, folder: Path, *arguments: str, status: int = 0) -> str:
    """What a dry run of a submitter says; nothing below the checkout is read."""
    command = ["bash", str(ROOT / "scripts/slurm" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=slurm(folder, DRY_RUN="1"), check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_a_submitter_takes_the_short_names_of_base_and_trained_models(tmp_path: Path) -> None:
    for name, adapter in (("qwen3", "qwen3-8b"), ("llama", "llama-3.1-8b")):
        model = {"qwen3": "Qwen/Qwen3-8B", "llama": "meta-llama/Llama-3.1-8B"}[name]
        said = dry("submit.sh", tmp_path, name, "--partition", "gpu")
        assert said.count("would send") == 1 and f"phase1_baselines.sh {model}" in said
        assert f"--backbone {model}" in said and "--adapter" not in said
        assert "not trained yet" in dry("submit.sh", tmp_path, f"{name}_trained")
        (tmp_path / "adapters" / adapter / "final").mkdir(parents=True)
        (tmp_path / "adapters" / adapter / "final/training.json").touch()
        said = dry("submit.sh", tmp_path, f"{name}_trained")
        assert f"phase3_evaluate.sh {model}" in said and f"--adapter {tmp_path}/adapters/{adapter}/final" in said
    assert "phase2_train.sh Qwen/Qwen3-8B" in dry("submit.sh", tmp_path, "2", "qwen3")


def test_all_measurements_are_submitted_at_once_or_those_that_are_named(tmp_path: Path) -> None:
    said = dry("submit_all.sh", tmp_path)
    assert [line.split()[2] for line in said.splitlines() if "would send" in line] == [
        *["phase1_baselines.sh"] * 2,
        *["phase3_evaluate.sh"] * 2,
    ]
    assert dry("submit_all.sh", tmp_path, "llama").count("would send") == 1


@pytest.mark.parametrize("script", ["submit.sh", "submit_all.sh"])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(script: str, tmp_path: Path) -> None:
    said = dry(script, tmp_path, "qwen3", "qwen4", status=2)
    assert "there is no model 'qwen4': expected qwen3, llama" in said and "would send" not in said
    assert "is measured in phase 3" in dry("submit.sh", tmp_path, "1", "qwen3_trained", status=2)


def test_no_more_jobs_than_allowed_are_sent_and_none_where_the_queue_is_not_known(tmp_path: Path) -> None:
    for name, body in {"squeue": "exit 1", "sbatch": f"echo sent >> {tmp_path}/sent"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = slurm(tmp_path, MODELS="Qwen/Qwen3-8B", PATH=f"{tmp_path}:{os.environ['PATH']}")
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
    path = f"{tmp_path}:{os.environ['PATH']}"
    env = slurm(tmp_path, MODELS="Qwen/Qwen3-8B", PRESSES_PYTHON="python", PATH=path)
    command = ["bash", str(ROOT / "scripts/slurm/submit.sh"), "1"]
    for _ in range(20):  # a pipe that is closed early kills who writes into it, now and then
        subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    assert (tmp_path / "sent").read_text() == "sent\n" * 20


def test_a_phase_that_cannot_be_planned_is_an_error_and_one_without_an_adapter_is_not_sent(tmp_path: Path) -> None:
    for name in ("squeue", "sbatch"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n")
        (tmp_path / name).chmod(0o755)
    env = slurm(tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
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
    assert len(scripts) == 8
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
    env = slurm(tmp_path, DRY_RUN="1", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_NUM_NODES="2")
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
