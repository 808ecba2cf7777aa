"""The commands of the original write-ups, each run at a tiny size."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from smartkv import GateBank, Manifest
from tests.conftest import ROOT
from tests.lightning_fixtures import harvest, write_texts
from tests.models import save_random_gates

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a script in this process, from a folder that is not the checkout."""

    def run(name: str, *arguments: Any) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")

    return run


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), splits=["train", "validation", "test"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path, texts: Path) -> Path:
    return harvest(tmp_path_factory.mktemp("harvest") / "shards", tiny_backbone, texts)


def sources(texts: Path) -> str:
    return json.dumps([{"name": "mine", "path": str(texts)}])


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("benchmark_kv.py", ["--model", "--gates", "--out"]),
        ("explore_model.py", ["--model", "--out"]),
        ("generate_dataset.py", ["--num_samples", "--model", "--out"]),
        ("train_mlps.py", ["--epochs", "--batch_size", "--data", "--model", "--out"]),
        ("export_heads.py", ["{shards,gates}", "--threshold"]),
        ("train_eit.py", ["--schedule", "--keep_ratio_start", "--keep_ratio_end", "--keep_ratio_change", "--tolerance",
                          "--anchor_sinks", "--anchor_recent", "--anchor_special", "--anchor_punctuation"]),
    ],
)  # fmt: skip
def test_the_help_shows_the_options_in_a_moment(script: str, options: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}, cwd="/")
    assert done.returncode == 0 and all(option in done.stdout for option in options)
    assert script == "export_heads.py" or "torch" not in done.stderr, "the help waits for an import of seconds"


def test_explore_model_calibrates(run: Run, tiny_backbone: Path, texts: Path, tmp_path: Path) -> None:
    small = ["--window", 64, "--windows", 1, "--follow_up", 16, "--sources", sources(texts)]
    run("explore_model", "--model", tiny_backbone, "--out", tmp_path / "out", *small)
    assert json.loads((tmp_path / "out/calibrate.json").read_text())["architecture"]["layers"] == 2


def test_generate_dataset_harvests(run: Run, tiny_backbone: Path, texts: Path, tmp_path: Path) -> None:
    small = {"data.init_args.window": 256, "model.init_args.follow_up": 32, "model.init_args.ages": "[8]",
             "model.init_args.threads": 1, "data.init_args.sources": sources(texts),
             "trainer.accelerator": "cpu"}  # fmt: skip
    more = [part for name, value in small.items() for part in (f"--{name}", value)]
    run("generate_dataset", "--num_samples", 4, "--model", tiny_backbone, "--out", tmp_path / "shards", *more)
    manifest = Manifest.read(tmp_path / "shards")
    windows = {split: sum(s.windows for s in manifest.of_split(split)) for split in ("train", "validation")}
    assert windows == {"train": 3, "validation": 1} and manifest.arguments["backbone"] == str(tiny_backbone)


def test_train_mlps_trains(run: Run, tiny_backbone: Path, shards: Path, tmp_path: Path) -> None:
    small = {"footprints": "[0.5]", "windows": 1, "dtype": "float32"}
    more = [
        part for name, value in small.items() for part in (f"--trainer.callbacks.HybridCachePerplexity.{name}", value)
    ]
    options = [
        "--epochs",
        1,
        "--batch_size",
        64,
        "--data",
        shards,
        "--model",
        tiny_backbone,
        "--out",
        tmp_path / "gates",
    ]
    run("train_mlps", *options, "--trainer.accelerator", "cpu", *more)
    trained = GateBank.from_pretrained(tmp_path / "gates/export")
    settings = trained.details["training"]
    assert len(trained) == 4 and settings["epoch"] == 0


def test_train_mlps_refuses_shards_of_another_model(run: Run, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("train_mlps", "--data", shards, "--model", "other/model")
    assert stop.value.code == 2
    assert "not from other/model: give --data" in capsys.readouterr().err


def test_benchmark_kv_measures(run: Run, tiny_backbone: Path, texts: Path, tmp_path: Path) -> None:
    gates = save_random_gates(tiny_backbone, tmp_path / "gates")
    small = ["--window", 128, "--windows", 1, "--score_from", 64, "--calibration_windows", 1, "--footprints", "[0.5]"]
    small += ["--dtype", "float32", "--policies", '["all-gated"]', "--sources", sources(texts)]
    run("benchmark_kv", "--model", tiny_backbone, "--gates", gates, "--out", tmp_path / "out", *small)
    assert json.loads((tmp_path / "out/perplexity.json").read_text())["arguments"]["backbone"] == str(tiny_backbone)


@pytest.mark.parametrize("what", ["shards", "gates"])
def test_export_heads_writes_a_file_a_head(
    what: str, run: Run, tiny_backbone: Path, shards: Path, tmp_path: Path
) -> None:
    source = shards if what == "shards" else save_random_gates(tiny_backbone, tmp_path / "gates")
    run("export_heads", what, source, tmp_path / "heads")
    assert len({path.parent if what == "shards" else path for path in (tmp_path / "heads").rglob("*.safetensors")}) == 4


@pytest.mark.filterwarnings("ignore")
def test_train_eit_tunes_with_its_schedule_and_anchors(
    run: Run, tiny_backbone: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eit"
    old = {"model": tiny_backbone, "output_dir": out, "num_samples": 4, "max_length": 128, "gradient_accumulation": 1,
           "save_steps": 2, "lora_r": 2, "schedule": "adaptive", "keep_ratio_end": 0.5, "anchor_recent": 8}  # fmt: skip
    small = {"data.init_args.sources": sources(texts), "model.init_args.dtype": "float32", "model.init_args.threads": 1,
             "trainer.accelerator": "cpu"}  # fmt: skip
    run(
        "train_eit",
        *(part for name, value in (old | small).items() for part in (f"--{name}", value)),
        "--no-anchor_special",
    )
    told = json.loads((out / "final/training.json").read_text())
    schedule, anchors = (told[part]["init_args"] for part in ("schedule", "dropping"))
    assert told["schedule"]["class_path"] == "Adaptive" and (schedule["start"], schedule["end"]) == (0.9, 0.5)
    assert anchors == {"sinks": 4, "recent": 8, "special": False, "punctuation": True, "share": "head"}
    for step in (2, 4):
        base = AutoModelForCausalLM.from_pretrained(tiny_backbone)
        assert PeftModel.from_pretrained(base, out / f"checkpoint-{step}").peft_config["default"].r == 2
