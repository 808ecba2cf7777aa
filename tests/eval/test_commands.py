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
from eval.common.options import Model
from tests.lightning_fixtures import ROOT, write_texts
from tests.models import save_tiny_backbone

PNG = b"\x89PNG"


def run_eval(*args: str | Path) -> None:
    main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Path:
    folder = tmp_path_factory.mktemp("calibrate")
    texts = write_texts(folder / "texts")
    run_eval("calibrate", "--backbone", tiny_backbone, "--out", folder / "out", "--window", "64", "--windows", "2",
             "--sources", json.dumps([{"name": "mine", "path": str(texts)}]))  # fmt: skip
    return folder / "out"


def figures(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_calibrate_tells_the_architecture_and_the_key_site(calibrated: Path) -> None:
    architecture = figures(calibrated / "calibrate.json")["architecture"]
    assert (architecture["layers"], architecture["query_heads"], architecture["kv_heads"]) == (2, 4, 2)
    assert architecture["gates"] == 4
    assert architecture["pre_rope_key"]["module"] == "k_proj"


def test_calibrate_describes_attention_by_layer_and_over_all_heads(calibrated: Path) -> None:
    attention = figures(calibrated / "calibrate.json")["attention"]
    assert len(attention["layers"]) == 2
    for row in [*attention["layers"], attention["all_heads"]]:
        assert set(row["percentiles"]) == {"50", "75", "90", "95", "99", "99.9"}
        assert 0 <= row["min"] <= row["median"] <= row["suggested_threshold"] <= row["max"] <= 1
        assert {"0.05", "0.1"} < set(row["share_above"])


def test_calibrate_shows_that_a_higher_threshold_shortens_lives(calibrated: Path) -> None:
    labels = figures(calibrated / "calibrate.json")["labels"]
    assert list(labels) == ["0.02", "0.05", "0.11"]
    means = [row["mean_log4_lifespan"] for row in labels.values()]
    assert means == sorted(means, reverse=True)


def test_calibrate_leaves_three_pictures(calibrated: Path) -> None:
    pictures = sorted(calibrated.glob("*.png"))
    names = [picture.stem for picture in pictures]
    assert names == ["attention_by_layer", "lifespans_by_head", "lifespans_by_threshold"]
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "gpt2"])
def test_calibrate_works_for_every_family(family: str, tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "lm", family)
    texts = write_texts(tmp_path / "texts", files=1)
    run_eval("calibrate", "--backbone", backbone, "--out", tmp_path / "out", "--window", "32", "--windows", "1",
             "--sources", json.dumps([{"name": "mine", "path": str(texts)}]))  # fmt: skip
    assert (tmp_path / "out" / "calibrate.json").exists()


def test_a_mistake_ends_in_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_eval("gates", "--gates", tmp_path / "none", "--shards", tmp_path, "--out", tmp_path / "out")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: gates") and error.count("\n") == 1


@pytest.mark.usefixtures("measured")
def test_speed_measures_tokens_a_second_and_peak_memory(tmp_path: Path, tiny_backbone: Path) -> None:
    ways = ["smartkv_all_labels", "output_attentions"]
    run_eval("speed", "--backbone", tiny_backbone, "--out", tmp_path, "--lengths", "[64]", "--rounds", "3",
             "--threads", "1", "--ways", json.dumps(ways), "--markdown_file", tmp_path / "page.md")  # fmt: skip
    ours, theirs = rows = figures(tmp_path / "speed.json")["harvest"]
    assert [row["way"] for row in rows] == ways
    for row in rows:
        assert len(row["seconds"]) == 3 and row["peak_memory"] > 2**26
        assert row["tokens_per_second"] == pytest.approx(64 / sorted(row["seconds"])[1])
    faster = sorted(old / new for old, new in zip(theirs["seconds"], ours["seconds"], strict=True))[1]
    line = next(line for line in (tmp_path / "page.md").read_text().splitlines() if ways[0] in line)
    assert [cell.strip() for cell in line.split("|")][3:6:2] == ["3", f"{faster:.2f}"]
    assert (tmp_path / "harvest_speed.png").read_bytes().startswith(PNG)


def test_ways_are_timed_in_turn_and_one_without_room_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from eval.speed import harvest

    ran: list[str] = []
    monkeypatch.setattr(harvest, "_loaded", lambda *_: (None, None))
    monkeypatch.setattr(harvest, "_run", lambda way, *_: float(len(ran.append(way) or ran)))
    assert harvest._seconds(["a", "b"], Model("lm"), 1, 64, 2) == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert ran == ["a", "b"] * 3

    def isolated(_: Any, ways: list[str], *__: Any) -> dict[str, Any]:
        return {"note": "killed"} if "output_attentions" in ways else {way: [2.0, 4.0, 8.0] for way in ways}

    monkeypatch.setattr(harvest, "run_isolated", isolated)
    found = harvest._timed(["forward", "output_attentions"], Model("lm"), 1, 64, 3)
    assert found["forward"]["tokens_per_second"] == 16 and found["output_attentions"] == {"note": "killed"}
    row = {"way": "output_attentions", "tokens": 64, "peak_memory": 2**30, **found["output_attentions"]}
    table = harvest._table([{"way": "forward", "tokens": 64, "peak_memory": 2**30, **found["forward"]}, row])
    assert [list(column.cells)[1] for column in table.columns][2:] == ["", "", "", "", "1.00", "1.00", "killed"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("ways", '["foo"]', "ways foo"), ("lengths", "[]", "some ways and lengths"), ("lengths", "[1]", "lengths 2"),
     ("lengths", "[64, 99999]", "positions"), ("rounds", "0", "rounds")],
)  # fmt: skip
def test_speed_tells_mistakes_in_a_line(
    name: str, value: str, says: str, tmp_path: Path, tiny_backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["speed", "--backbone", str(tiny_backbone), "--out", str(tmp_path), f"--{name}", value])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and says in said and said.count("\n") == 1


def test_growth_is_read_off_all_lengths() -> None:
    from eval.speed.harvest import _growth

    rows = [
        {"way": "w", "tokens": n, "tokens_per_second": n / (3e-6 * n**1.5), "peak_memory": 10**8 + 700 * n}
        for n in (512, 1024, 2048, 8192)
    ]
    found = _growth(rows, "w")
    assert (found["exponent"], found["bytes_a_token"]) == pytest.approx((1.5, 700)) and found["off_the_line"] < 1e-6
    rows[1]["peak_memory"] *= 2
    assert _growth(rows, "w")["off_the_line"] > 0.2


def test_both_ways_of_the_speed_command_give_the_same_lifespans(tiny_backbone: Path) -> None:
    import torch

    from eval.speed.harvest import _output_attentions
    from smartkv import LabelSpec, label_window, load_backbone

    lm, tokens = load_backbone(str(tiny_backbone), "float32"), torch.arange(100) % 250
    ours = label_window(lm.model, tokens, LabelSpec((0.05,), (), 10)).lifespan[0]
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        old = torch.stack(_output_attentions(lm, tokens))
    assert torch.equal(ours.long(), old)


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


def test_anchors_are_where_the_attention_goes(tmp_path: Path, tiny_backbone: Path) -> None:
    texts = write_texts(tmp_path / "texts", splits=["validation"])
    sources = json.dumps([{"name": "mine", "path": str(texts)}])
    options = ["--sources", sources, "--windows", "2", "--window", "96", "--recent", "8", "--dtype", "float32"]
    main(["anchors", "--backbone", str(tiny_backbone), "--out", str(tmp_path / "out"), *options])
    found = json.loads((tmp_path / "out" / "anchors.json").read_text())
    assert sum(found["keys"]) == pytest.approx(1.0) and found["classes"][:2] == ["sink", "recent"]
    for layer in found["attention"]:
        assert sum(layer) == pytest.approx(1.0)
    # queries 24 … 95 see 4 sinks and 8 recent tokens each
    keys = sum(query + 1 for query in range(24, 96))
    assert found["keys"][:2] == pytest.approx([72 * 4 / keys, 72 * 8 / keys])
    assert (tmp_path / "out" / "anchors.png").stat().st_size > 10_000


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
