"""Configs that SmartKV 0.1.0 saved beside its runs, with the class paths of its modules: they are read, and run.

Commit 4f2a3b4 wrote `before_the_move/saved/` in runs of one epoch with the configs in `before_the_move/`.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lightning_fixtures import ROOT, run_cli, write_config

FILES = Path(__file__).parent / "before_the_move"
FITS = ("gates", "distilled", "eviction_tuning")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs' paths begin there."""
    monkeypatch.chdir(ROOT)


def printed(subcommand: str, path: Path, *options: str) -> dict[str, Any]:
    """What `--print_config` prints, with classes by their bare names."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
        run_cli(subcommand, "-c", path, *options, "--print_config")
    assert stop.value.code == 0
    return bare(yaml.safe_load(output.getvalue()))


def bare(content: Any) -> Any:
    if isinstance(content, list):
        return [bare(each) for each in content]
    if isinstance(content, dict):
        return {k: v.rpartition(".")[2] if k == "class_path" else bare(v) for k, v in content.items()}
    return content


@pytest.mark.parametrize("name", FITS)
def test_a_saved_config_has_the_settings_of_the_run(name: str) -> None:
    saved = printed("fit", FILES / "saved" / f"{name}.yaml")
    assert saved == printed("fit", FILES / f"{name}.yaml", "--trainer.max_epochs", "1")


def test_a_saved_config_of_a_harvest_has_the_settings_of_the_run() -> None:
    assert printed("predict", FILES / "saved" / "harvest.yaml") == printed("predict", FILES / "harvest.yaml")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subcommand", ["fit", "validate"])
@pytest.mark.parametrize("name", FITS)
def test_a_saved_config_runs(name: str, subcommand: str, tmp_path: Path) -> None:
    config = yaml.safe_load((FILES / "saved" / f"{name}.yaml").read_text())
    config["trainer"] |= {"default_root_dir": str(tmp_path), "fast_dev_run": True}
    for callback in config["trainer"]["callbacks"]:
        where = "dirpath" if "dirpath" in callback["init_args"] else "out"
        callback["init_args"][where] = str(tmp_path / callback["class_path"])
    path = write_config(tmp_path / "run.yaml", config)
    run_cli(subcommand, "-c", path, "--ckpt_path", FILES / "checkpoints" / f"{name}.ckpt")


@pytest.mark.parametrize(
    ("full", "name"),
    [
        ("callbacks.gate_export.GateExport", "GateExport"),
        ("callbacks.GateExport", "GateExport"),
        ("GateExport", "GateExport"),
    ],
)
def test_a_callback_goes_by_any_path_it_has_had(full: str, name: str, tmp_path: Path) -> None:
    config = yaml.safe_load((FILES / "gates.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": full, "init_args": {"out": str(tmp_path)}}]
    callbacks = printed("fit", write_config(tmp_path / "run.yaml", config))["trainer"]["callbacks"]
    assert [callback["class_path"] for callback in callbacks] == [name]


@pytest.mark.parametrize("path", ["smartkv.objectives.Log4Lifespan", "smartkv.gates.objectives.Log4Lifespan"])
def test_an_objective_by_its_whole_path_is_the_one_by_its_name(path: str) -> None:
    config, option = ROOT / "configs/gates/smollm2.yaml", "--model.init_args.objective"
    whole, bare_name = (printed("fit", config, option, name) for name in (path, "Log4Lifespan"))
    assert whole == bare_name and whole["model"]["init_args"]["objective"]["class_path"] == "Log4Lifespan"
