"""`make gates`: one command from a model to gates, that goes on after a kill and tells everything beforehand."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from smartkv import GateBank, LifespanCache, load_backbone
from tests.cli.fixtures import make, never, own_sources, refused, run_here, write_own_texts
from tests.families import FORMS, save_family
from tests.imports import ROOT
from tests.models import save_tiny_backbone

pytestmark = pytest.mark.filterwarnings("ignore")


class Run:
    """The tiny run that the tests look at: stopped before the distillation, and given again.

    Attributes:
        args: the command line.
        out: its folder.
        first, second: what the two calls printed; `first_error`: stderr of the first.
        commands: of each call, the commands that its steps ran.
    """

    def __init__(self, args: list[str], out: Path) -> None:
        self.args, self.out = args, out
        self.commands: list[list[list[str]]] = []
        self.first = self.second = self.first_error = ""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("make_gates")
    args = ["--backbone", str(tiny_backbone), "--out", str(folder / "out"), "--size", "tiny", "--dtype", "float32"]
    run = Run(args, folder / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SMARTKV_DATA", raising=False)

        def stopped(command: list[str]) -> None:
            run.commands[-1].append(command)
            if "distilled.yaml" in command[-1] and len(run.commands) == 1:
                raise KeyboardInterrupt
            run_here(command)

        run.commands.append([])
        with (
            contextlib.redirect_stdout(io.StringIO()) as said,
            contextlib.redirect_stderr(io.StringIO()) as errors,
            pytest.raises(SystemExit) as stop,
        ):
            make(patch, stopped, *args)
        assert stop.value.code == 130
        run.first, run.first_error = said.getvalue(), errors.getvalue()
        run.commands.append([])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            make(patch, stopped, *args)
        run.second = said.getvalue()
        yield run


def steps(commands: list[list[str]]) -> list[str]:
    return [next(Path(word).stem for word in command if word.endswith(".yaml")) for command in commands]


def args_in(made: Run, folder: Path) -> list[str]:
    """The command line of the run with another folder."""
    return [str(folder) if word == str(made.out) else word for word in made.args]


def moved(made: Run, folder: Path) -> Path:
    """Copy the run to another folder."""
    shutil.copytree(made.out, folder, ignore=shutil.ignore_patterns(".lock", "configs"))  # the configs name the folder
    return folder


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_the_gates_serve_the_model_at_a_footprint(made: Run, tiny_backbone: Path) -> None:
    lm = load_backbone(str(tiny_backbone), "float32")
    with LifespanCache(lm.model, gates=made.out / "gates", footprint=0.25) as cache, torch.inference_mode():
        lm.model(torch.arange(400)[None] % 200, past_key_values=cache)
    assert 0.05 < cache.footprint < 0.6


def test_the_gates_remember_prices_and_what_each_layer_keeps(made: Run) -> None:
    details = GateBank.from_pretrained(made.out / "gates").details
    assert details["ages"] == [16, 64, 256] and len(details["prices"]) > 3
    assert [footprint for footprint, _ in details["layer_shares"]] == [footprint for footprint, _ in details["prices"]]


def test_the_card_tells_losses_by_kind_of_text_and_the_command(made: Run) -> None:
    card = (made.out / "gates" / "README.md").read_text()
    result = json.loads((made.out / "report" / "compare.json").read_text())
    row = next(row for row in result["rows"] if row["contender"] == "gates" and row["target"] == 0.25)
    figures = row["texts"]["manual"]
    assert f"| manual | 0.25 | {figures['footprint']:.3f} | {figures['delta_nll']:+.4f} (" in card
    assert "python -m cli.make_gates --backbone" in card and "--size tiny --dtype float32" in card
    assert "Licence: " in card and "transformers" in card and 'LifespanCache(model, gates="' in card


def test_the_card_goes_along_when_the_gates_are_pushed_to_the_hub(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, str] = {}

    def upload_folder(self: HfApi, *, folder_path: str, **_: Any) -> None:
        sent.update({path.name: path.read_text(errors="replace") for path in Path(folder_path).iterdir()})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    GateBank.from_pretrained(made.out / "gates").push_to_hub("user/name")
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}
    assert "| manual | 0.25 |" in sent["README.md"] and "layer_shares" in json.loads(sent["config.json"])["details"]


def test_it_ends_with_how_to_use_and_to_publish_the_gates(made: Run) -> None:
    gates = made.out / "gates"
    assert f'LifespanCache(model, gates="{gates}", footprint=0.25)' in made.second
    assert f'GateBank.from_pretrained("{gates}").push_to_hub("user/name")' in made.second
    assert f"picture: {made.out / 'report' / 'frontier_manual.png'}" in made.second


def test_no_step_tells_what_comes_after_it_alone(made: Run) -> None:
    assert "shards with" in made.first and "best gates, of epoch" in made.first + made.second
    assert "train gates:" not in made.first and "measure them:" not in made.first + made.second
    assert made.second.count("use them: ") == 1


# -- what it tells beforehand -----------------------------------------------------------------------------------------


def test_time_and_disk_of_each_step_are_printed_before_the_first(made: Run) -> None:
    before, _, _ = made.first.partition(" harvest ──")
    rows = {line.split("│")[1].strip(): line.split("│") for line in before.splitlines() if line.startswith("│")}
    for step in ("harvest", "lifespans", "distilled", "report", "all"):
        assert rows[step][3].strip().endswith((" s", " min")) and rows[step][4].strip().endswith(" MB")


def test_each_step_is_printed_as_a_command_with_its_config(made: Run) -> None:
    for step, program in (("harvest", "main.py predict -c"), ("report", "-m eval compare --config")):
        assert f"python {program} {made.out / 'configs' / f'{step}.yaml'}" in made.first
        opening = (made.out / "configs" / f"{step}.yaml").read_text().partition("\n\n")[0]
        assert f"python {program} {made.out / 'configs' / f'{step}.yaml'}" in opening


def test_texts_that_cannot_be_had_are_told(made: Run) -> None:
    assert "left out: pg19 (15% of the mix)" in made.first and "manual of Python" in made.first


# -- it goes on -------------------------------------------------------------------------------------------------------


def test_a_stopped_run_says_how_to_go_on(made: Run) -> None:
    line = made.first_error.strip().splitlines()[-1]
    assert line.startswith("interrupted: go on with: python -m cli.make_gates --backbone")


def test_the_same_command_goes_on_where_it_was_stopped(made: Run) -> None:
    first, second = made.commands
    assert steps(first) == ["harvest", "lifespans", "distilled"] and steps(second) == ["distilled", "report"]
    assert " look ──" in made.first and " look ──" not in made.second


def test_a_slash_at_the_end_of_the_model_s_folder_makes_no_other_model(
    made: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, backbone, *rest = made.args
    make(monkeypatch, never, name, f"{backbone}/", *rest)
    assert "push_to_hub" in capsys.readouterr().out


def test_a_finished_run_only_tells_its_result(
    made: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(monkeypatch, never, *made.args)
    said = capsys.readouterr().out
    assert said.count("│      done │") == 4 and "push_to_hub" in said


def test_the_table_names_the_split_of_texts_that_are_no_test(
    made: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = GateBank.from_pretrained(moved(made, tmp_path / "out") / "gates")
    for row in gates.details["report"]["texts"]:
        row["split"] = "validation"
    gates.save_pretrained(tmp_path / "out" / "gates")
    make(monkeypatch, never, *args_in(made, tmp_path / "out"))
    said = capsys.readouterr().out
    assert "ΔNLL on validation texts, nats a token" in said and "│ manual (validation) │" in said


def test_shards_that_are_no_longer_needed_may_be_deleted(
    made: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(made.out, tmp_path / "out", ignore=shutil.ignore_patterns("shards", ".lock"))
    shutil.rmtree(tmp_path / "out" / "configs")  # they name the folder
    args = [str(tmp_path / "out") if word == str(made.out) else word for word in made.args]
    make(monkeypatch, never, *args)
    assert (tmp_path / "out" / "configs" / "harvest.yaml").is_file()


def test_a_run_may_stop_after_a_step(
    made: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(monkeypatch, never, *made.args, "--stop-after", "lifespans")
    assert "stopped after lifespans" in capsys.readouterr().out


# -- what is refused --------------------------------------------------------------------------------------------------


def test_other_options_in_the_same_folder_are_refused_with_what_differs(
    made: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, monkeypatch, *made.args, "--size", "small", "--seed", "3")
    assert "(size tiny, now small; seed 0, now 3)" in line and "--overwrite" in line


def test_overwrite_begins_anew(
    made: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (moved(made, tmp_path / "out") / "report" / "mine.txt").write_text("mine")
    args = [*args_in(made, tmp_path / "out"), "--overwrite", "--seed", "1", "--stop-after", "look"]
    make(monkeypatch, never, *args)
    left = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    configs = [f"configs/{step}.yaml" for step in ("distilled", "harvest", "lifespans", "report")]
    assert left == [".lock", *configs, "recipe.json", "report/mine.txt"]  # all that the steps made is gone
    assert "this command did not make it: " in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "out/configs/harvest.yaml").read_text())["data"]["init_args"]["seed"] == 1


def test_a_folder_of_other_things_is_refused_and_left_alone(
    made: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    args = [str(tmp_path) if word == str(made.out) else word for word in made.args]
    for more in ([], ["--overwrite"]):
        assert "holds thesis.tex, which this command did not make" in refused(capsys, monkeypatch, *args, *more)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# -- in processes of their own, and other families --------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_in_a_step_ends_it_and_the_same_command_goes_on(tiny_backbone: Path, tmp_path: Path) -> None:
    texts = write_own_texts(tmp_path / "texts")
    command = [sys.executable, "-m", "cli.make_gates", "--backbone", str(tiny_backbone), "--out", str(tmp_path / "out"),
               "--size", "tiny", "--sources", own_sources(texts)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (tmp_path / "out/lifespans/checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("interrupted: go on with: ")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert GateBank.from_pretrained(tmp_path / "out/gates").details["report"]["texts"]


SOME = ["gpt2", "qwen3", "phi3", "gemma3_text, sliding", "qwen3_moe", "cohere2, sliding", "glm4", "mistral_sliding"]


@pytest.mark.slow
@pytest.mark.parametrize("form", SOME)
def test_the_road_can_be_gone_with_a_model_of_many_families(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = save_family if form in FORMS else lambda folder, family: save_tiny_backbone(folder, family)
    backbone = save(tmp_path / "backbone", form)
    sources = own_sources(write_own_texts(tmp_path / "texts"))
    args = ["--backbone", backbone, "--out", tmp_path / "out", "--size", "tiny", "--sources", sources]
    make(monkeypatch, run_here, *args, "--dtype", "float32")
    lm = load_backbone(str(backbone), "float32")
    gates = GateBank.from_pretrained(tmp_path / "out/gates", lm.model)
    assert gates.layers == lm.architecture.gated_layers
    assert len(gates.details["layer_shares"][0][1]) == lm.architecture.layers
    assert "push_to_hub" in capsys.readouterr().out
