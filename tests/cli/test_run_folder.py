"""One folder for a run: what lies in it, and whose result a second run may not replace."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace

from cli.run_folder import place_in_folder, root_of
from smartkv import Manifest
from smartkv.errors import SmartKVError
from tests.lightning_fixtures import (
    error_line,
    gates_config,
    harvest_config,
    refused,
    run_cli,
    write_config,
)
from tests.models import save_random_gates
from tests.tuning_fixtures import config as tuning_config
from tests.tuning_fixtures import write_long_texts

CHECKPOINTS = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "enable_version_counter": False}}
QUIET = ("default_root_dir", "logger")


def config_of(shards: Path, out: Path | None, **settings: Any) -> dict[str, Any]:
    """A fit of gates that names no folder but `out`."""
    callbacks = [CHECKPOINTS, {"class_path": "GateExport"}, {"class_path": "HeadDashboard"}]
    config = gates_config(shards, Path("unused"), callbacks=callbacks, **settings)
    config["trainer"] = {key: value for key, value in config["trainer"].items() if key not in QUIET}
    config["trainer"]["max_epochs"] = 1
    return config if out is None else config | {"out": str(out)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A folder in which a fit has ended; its config is beside it."""
    out = tmp_path_factory.mktemp("done") / "run"
    run_cli("fit", "-c", write_config(out.with_name("fit.yaml"), config_of(tiny_shards, out)))
    return out


@pytest.fixture
def again(done: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(done, tmp_path / "run"))


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Content of each file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- one folder -------------------------------------------------------------------------------------------------------


def test_all_that_a_fit_writes_lies_in_its_folder(done: Path) -> None:
    names = {name for name in files(done) if "tfevents" not in name and "epoch=" not in name}
    assert names == {".lock", "config.yaml", "hparams.yaml", "heads.csv", "checkpoints/last.ckpt"} | {
        f"export/{name}" for name in ("config.json", "model.safetensors", "README.md")
    }
    assert any("tfevents" in path.name for path in done.iterdir())
    assert {path.name for path in done.parent.iterdir()} == {"run", "fit.yaml"}


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_saved_config_moves_to_another_folder_as_a_whole(done: Path, tmp_path: Path) -> None:
    before = files(done)
    run_cli("fit", "-c", done / "config.yaml", "--out", tmp_path / "moved")
    assert files(done) == before
    assert {Path(name).parent.as_posix() for name in files(tmp_path / "moved")} == {".", "checkpoints", "export"}


@pytest.mark.parametrize(
    ("settings", "args", "root"),
    [
        ({"out": "a"}, [], "a"),
        ({"out": "a", "old": "b"}, [], "b"),  # an overlay of version 0.1 on a config of today
        ({"out": "a", "old": "b"}, ["--out", "a"], "a"),
        ({"out": "a", "old": "b"}, ["--out=a"], "a"),
        ({"out": "a", "old": "b"}, ["--trainer.default_root_dir", "b"], "b"),
        ({"out": "a", "old": "a"}, ["--out", "a", "--trainer.default_root_dir=a"], "a"),
        ({}, [], None),
    ],
)
def test_the_folder_is_the_one_that_was_typed_else_the_one_of_the_files(
    settings: dict[str, str], args: list[str], root: str | None
) -> None:
    trainer = Namespace(default_root_dir=settings.get("old"))
    assert root_of(Namespace(out=settings.get("out"), trainer=trainer), args) == root


def test_two_folders_on_one_command_line_are_refused() -> None:
    config = Namespace(out="a", trainer=Namespace(default_root_dir="b"))
    with pytest.raises(SmartKVError, match="give --out alone"):
        root_of(config, ["--out", "a", "--trainer.default_root_dir", "b"])


def test_a_folder_that_a_config_sets_itself_is_kept() -> None:
    checkpoint = Namespace(class_path="x.ModelCheckpoint", init_args=Namespace(dirpath="mine"))
    data = Namespace(class_path="datamodules.DocumentWindows", init_args=Namespace(out="shards"))
    config = Namespace(trainer=Namespace(logger=False, callbacks=[checkpoint]), data=data)
    place_in_folder(config, "run")
    assert config.trainer.logger is False and config.trainer.default_root_dir == "run"
    assert (checkpoint.init_args.dirpath, data.init_args.out) == ("mine", "shards")


def test_a_harvest_s_folder_is_that_of_its_shards(tiny_backbone: Path, tiny_texts: Path, tmp_path: Path) -> None:
    config = harvest_config(tmp_path / "unused", tiny_backbone, tiny_texts, windows={"train": 1, "validation": 1})
    del config["data"]["init_args"]["out"], config["trainer"]["default_root_dir"]
    run_cli("predict", "-c", write_config(tmp_path / "harvest.yaml", config), "--out", tmp_path / "shards")
    assert Manifest.read(tmp_path / "shards").shards
    assert {path.name for path in tmp_path.iterdir()} == {"harvest.yaml", "shards"}


def test_a_harvest_without_a_folder_is_told_of_out(
    tiny_backbone: Path, tiny_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harvest_config(tmp_path / "unused", tiny_backbone, tiny_texts)
    del config["data"]["init_args"]["out"], config["trainer"]["default_root_dir"]
    assert "--out" in error_line(refused(capsys, "predict", "-c", write_config(tmp_path / "harvest.yaml", config)))


def test_two_exports_into_one_folder_are_refused(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_shards, tmp_path / "run")
    config["trainer"]["callbacks"].append({"class_path": "GateExport", "init_args": {"monitor": "val_loss"}})
    said = refused(capsys, "fit", "-c", write_config(tmp_path / "fit.yaml", config))
    assert "two GateExports" in error_line(said)


# -- another run's result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["export", "checkpoints", "heads.csv", None])
@pytest.mark.parametrize("name", ["--out", "--trainer.default_root_dir"])
def test_a_second_fit_leaves_the_result_of_the_first_and_says_what_to_do(
    name: str, kept: str | None, again: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ("export", "checkpoints", "heads.csv"):
        if kept is not None and part != kept:
            path = again / part
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = files(again)
    config = write_config(tmp_path / "other.yaml", config_of(tiny_shards, None, model={"hidden": 4}))
    line = error_line(refused(capsys, "fit", "-c", config, name, again))
    assert all(word in line for word in (str(again), "--out", "--overwrite", "--ckpt_path last"))
    assert files(again) == before


def test_a_fit_that_is_told_to_overwrite_leaves_nothing_of_the_first(
    again: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    before = files(again)
    config = write_config(tmp_path / "other.yaml", config_of(tiny_shards, again, model={"hidden": 4}))
    run_cli("fit", "-c", config, "--overwrite")
    after = files(again)
    assert yaml.safe_load(after["config.yaml"])["model"]["init_args"]["hidden"] == 4
    assert not yaml.safe_load(after["config.yaml"])["overwrite"]  # or the saved config would replace its own run
    assert sum("tfevents" in name for name in after) == 1
    assert not {n for n in before if n.endswith((".safetensors", ".ckpt", ".csv"))} & {
        name for name, content in after.items() if before.get(name) == content
    }


def test_a_mistake_costs_no_result_when_it_comes_with_overwrite(
    again: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "other.yaml", config_of(tiny_shards, again, data={"threshold": 0.4}))
    refused(capsys, "fit", "-c", config, "--overwrite")
    assert {"export/model.safetensors", "checkpoints/last.ckpt", "heads.csv"} <= set(files(again))


@pytest.mark.parametrize("last", [True, False])
def test_a_resume_goes_on_in_the_folder(last: bool, again: Path, tiny_shards: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "more.yaml", config_of(tiny_shards, again))
    checkpoint = again / "checkpoints" / "last.ckpt"
    step = torch.load(checkpoint, weights_only=True)["global_step"]
    run_cli("fit", "-c", config, "--ckpt_path", "last" if last else checkpoint, "--trainer.max_epochs", "2")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2 * step


def test_the_checkpoint_of_another_run_does_not_open_a_folder_with_a_result(
    done: Path, again: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "more.yaml", config_of(tiny_shards, again))
    said = refused(capsys, "fit", "-c", config, "--ckpt_path", done / "checkpoints" / "last.ckpt")
    assert "holds the result of another run" in error_line(said)


def test_to_resume_and_to_overwrite_at_once_is_refused(
    again: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "more.yaml", config_of(tiny_shards, again))
    said = refused(capsys, "fit", "-c", config, "--ckpt_path", "last", "--overwrite")
    assert "give one of them" in error_line(said)


@pytest.mark.filterwarnings("ignore:.*no last checkpoint")
def test_last_without_a_checkpoint_begins_anew_and_asks_too(
    again: Path, tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "fit.yaml", config_of(tiny_shards, again))
    shutil.rmtree(again / "checkpoints")
    assert "holds the result" in error_line(refused(capsys, "fit", "-c", config, "--ckpt_path", "last"))
    for path in (again / "heads.csv", *(again / "export").iterdir()):
        path.unlink()  # of a run that was killed before its first checkpoint only curves are left
    run_cli("fit", "-c", config, "--ckpt_path", "last")
    assert sum("tfevents" in name for name in files(again)) == 1


def test_curves_alone_are_a_result_where_a_run_writes_nothing_else(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_shards, tmp_path / "run")
    config["trainer"] |= {"callbacks": [], "enable_checkpointing": False}
    path = write_config(tmp_path / "fit.yaml", config)
    run_cli("fit", "-c", path)
    assert "tfevents" in error_line(refused(capsys, "fit", "-c", path))


def test_a_second_tuning_leaves_the_first_adapter(
    tiny_backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_long_texts(new(tmp_path / "texts"))
    config = tuning_config(tmp_path / "run", tiny_backbone, texts)
    config["trainer"] |= {"max_epochs": 1, "max_steps": 1}
    path = write_config(tmp_path / "tune.yaml", config)
    run_cli("fit", "-c", path)
    for checkpoint in (tmp_path / "run").rglob("*.ckpt"):
        checkpoint.unlink()
    assert "final holds the result" in error_line(refused(capsys, "fit", "-c", path))


def test_a_second_harvest_of_another_kind_is_refused_and_may_overwrite(
    tiny_backbone: Path, tiny_texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shards"
    settings: list[dict[str, Any]] = [{"windows": {"train": 3, "validation": 1}}, {"model": {"thresholds": [0.1]}}]
    configs = [harvest_config(out, tiny_backbone, tiny_texts, **each) for each in settings]
    first, second = (write_config(tmp_path / f"{n}.yaml", each) for n, each in enumerate(configs))
    run_cli("predict", "-c", first)
    before = files(out)
    assert "--overwrite" in error_line(refused(capsys, "predict", "-c", second))
    assert files(out) == before
    run_cli("predict", "-c", second, "--overwrite")
    manifest = Manifest.read(out)
    assert manifest.spec.thresholds == (0.1,)
    assert {path.name for path in out.glob("*-*.safetensors")} == {shard.file for shard in manifest.shards}


# -- fast_dev_run -----------------------------------------------------------------------------------------------------


def dry_run(kind: str, folder: Path, backbone: Path, texts: Path, shards: Path) -> dict[str, Any]:
    """The config of a run of one kind, with every folder that version 0.1 had keys for set in `folder`."""
    if kind == "harvest":
        return harvest_config(folder / "run", backbone, texts)
    if kind == "tuning":
        return tuning_config(folder / "run", backbone, texts)
    export = {"class_path": "GateExport", "init_args": {"out": str(folder / "run/export"), "per_head": True}}
    saved = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(folder / "run/checkpoints")}}
    config = gates_config(shards, folder / "run", callbacks=[export, saved, {"class_path": "HeadDashboard"}])
    if kind == "distillation":
        gates = save_random_gates(backbone, folder.parent / "start")
        export["init_args"] |= {"monitor": "val_loss", "mode": "min"}
        config["trainer"]["callbacks"].pop()
        config["model"] = {
            "class_path": "DistilledGates",
            "init_args": {"gates": str(gates), "backbone": str(backbone), "ages": [8, 24], "threads": 1},
        }
        source = {"name": "mine", "path": str(texts)}
        config["data"] = {
            "class_path": "TokenWindows",
            "init_args": {
                "sources": [source],
                "windows": {"train": 2, "validation": 1},
                "backbone": str(backbone),
                "window": 64,
            },
        }
    return config


@pytest.mark.parametrize("kind", ["harvest", "gates", "distillation", "tuning"])
@pytest.mark.parametrize("before", ["nothing", "a result"])
def test_a_fast_dev_run_writes_nothing_that_lasts(
    kind: str,
    before: str,
    done: Path,
    tiny_backbone: Path,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    texts = write_long_texts(new(tmp_path / "texts"))
    if before == "a result":
        shutil.copytree(done, work / "run")
    config = write_config(tmp_path / "run.yaml", dry_run(kind, work, tiny_backbone, texts, tiny_shards))
    content = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    run_cli("predict" if kind == "harvest" else "fit", "-c", config, "--trainer.fast_dev_run", "true")
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == content
