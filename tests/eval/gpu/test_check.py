"""The GPU check, end to end on the CPU at a tiny size, and on a machine that has little installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.gpu import whole_model
from eval.gpu.check import main
from eval.gpu.shapes import TINY
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import ROOT

ABSENT = ("jsonargparse", "gguf", "datasets", "tensorboard", "psutil")  # from a machine with lightning and peft alone


def checked(out: Path, *more: str) -> dict[str, Any]:
    assert main(["--device", "cpu", "--tiny", "--out", str(out), *more]) == 0
    return json.loads((out / "gpu.json").read_text())


def rows_of(found: dict[str, Any], part: str, way: str) -> list[dict[str, Any]]:
    return [row for row in found[part] if row.get("way") == way]


def test_a_bare_machine_runs_all_parts(tmp_path: Path) -> None:
    hidden = "; ".join(f"sys.modules['{name}'] = None" for name in ABSENT)
    code = f"import sys, runpy; {hidden}; sys.argv[1:] = {['--device', 'cpu', '--tiny', '--out', str(tmp_path)]!r}; "
    code += "runpy.run_module('eval.gpu', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, page = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    shapes = list(TINY)
    cells = [(shape, batch) for shape in shapes for batch in (1, 2)]
    pages = rows_of(found, "one_layer", "SmartKV, pages")
    assert [(row["shape"], row["batch"]) for row in pages] == cells
    assert all(row["microseconds"] > 0 and row["error"] < 1e-5 for row in pages)
    for way in ("SmartKV", "SmartKV, budget", "static", "dynamic"):
        steps = rows_of(found, "steps", way)
        assert [(row["shape"], row["batch"]) for row in steps] == cells and all(row["eager_ms"] > 0 for row in steps)
    for part, ways in (("prefill", 2), ("harvest", 3)):
        assert len(found[part]) == ways * len(shapes) and all(row["tokens_per_second"] > 0 for row in found[part])
    assert [row["held"] for row in found["memory"]] == [pytest.approx(32, abs=17)] * 2
    assert found["fit"][0]["ratio"] == pytest.approx(found["fit"][0]["apart"] / found["fit"][0]["together"])
    assert "on the CPU" in found["tests"][0]["note"]
    assert all(title in page for title in ("## Attention of one layer", "## Decode steps", "## Training of 48 gates"))


def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room\nfor more")

    monkeypatch.setattr(whole_model, "decode_steps", fails)
    found = checked(tmp_path)
    assert {row["note"] for row in found["steps"]} == {"failed: no room"}
    assert found["prefill"] and all("tokens_per_second" in row for row in found["prefill"])


def test_a_model_that_cannot_be_built_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise SmartKVError("no such family")

    monkeypatch.setattr("eval.gpu.check.build", fails)
    found = checked(tmp_path)
    assert [row["note"] for row in found["steps"]] == ["not built: no such family"] * len(TINY)
    assert "prefill" not in found and found["fit"]


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    found = checked(tmp_path, "--minutes", "0")
    assert {key for key in found if key not in ("arguments", "machine")} == {"one_layer", "tests", "fit"}
    assert all(row == {"note": "no time was left"} for part in ("one_layer", "tests", "fit") for row in found[part])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: device 'cuda' cannot be used here: torch finds no GPU\n"
    assert not list(tmp_path.iterdir())


def test_the_script_passes_its_options_on(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ROOT / "scripts/gpu_check.sh"), "--device", "cpu", "--tiny", "--minutes", "0"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(tmp_path / "docs")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (tmp_path / "docs").iterdir()) == ["gpu.json", "gpu.md"]
