"""Curves of a run that was killed and resumed: those of one that was not, each step once."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import head_dashboard
from lightning_modules.resumed_curves import ResumedCurves
from tests.callbacks.fixtures import tensorboard
from tests.lightning_fixtures import STEPS_AN_EPOCH, gates_config, logged, refused, run_cli, write_config

EPOCHS = 2
BESIDE = ("step", "epoch")  # Lightning logs them with every group of figures
Curve = dict[str, list[tuple[int, float]]]


def config(root: Path, shards: Path, epochs: int = EPOCHS) -> Path:
    """A fit with both loggers, and a checkpoint of each second step, each validation and each epoch."""
    csv = gates_config(shards, root)["trainer"]["logger"]
    saving = {"save_top_k": -1, "filename": "{step}", "enable_version_counter": False}
    kinds: dict[str, dict[str, Any]] = {
        "batch": {"every_n_train_steps": 2},
        "validation": {"monitor": "val_loss", "save_on_train_epoch_end": False},
        "epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    }
    checkpoints = [
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(root / name), **saving, **options}}
        for name, options in kinds.items()
    ]
    trainer = {"logger": [tensorboard(root), csv], "max_epochs": epochs}
    chosen = [{"class_path": "HeadDashboard"}, *checkpoints]
    return write_config(root / "run.yaml", gates_config(shards, root, trainer=trainer, callbacks=chosen))


@pytest.fixture(scope="module", autouse=True)
def small_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("heads_heatmap", "predicted_against_true"):  # drawing takes longer than these fits
            patch.setattr(head_dashboard, name, lambda *_: Figure((0.1, 0.1)))
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    root = tmp_path_factory.mktemp("whole")
    run_cli("fit", "-c", config(root, tiny_shards))
    return root


def board(root: Path) -> Curve:
    events = EventAccumulator(str(root / "board"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    images = {tag: [(event.step, 0.0) for event in events.Images(tag)] for tag in events.Tags()["images"]}
    layouts = {tag: [(event.step, 0.0) for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}
    return curves | images | layouts


def table(root: Path) -> Curve:
    curves: Curve = {}
    for row in logged(root):
        for name, value in row.items():
            curves.setdefault(name, []).append((int(row["step"]), value))
    return curves


def assert_same(mine: Curve, theirs: Curve, but: Iterable[str] = ()) -> None:
    assert mine.keys() == theirs.keys()
    for tag, points in theirs.items():
        if not tag.startswith(tuple(but)):
            assert [step for step, _ in mine[tag]] == [step for step, _ in points], tag
            assert [v for _, v in mine[tag]] == pytest.approx([v for _, v in points], abs=1e-6), tag


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "checkpoint",
    ["batch/step=4", "batch/step=10", "batch/step=14", "validation/step=10", "epoch/step=10", "epoch/step=20"],
)
def test_a_run_resumed_from_any_checkpoint_has_the_curves_of_the_uninterrupted_one(
    checkpoint: str, whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    run_cli("fit", "-c", config(root, tiny_shards), "--ckpt_path", root / f"{checkpoint}.ckpt")
    assert_same(board(root), board(whole), but=("val_r2_null", "epoch"))  # constants: a point a start
    assert_same(table(root), table(whole), but=BESIDE)
    nulls = board(root)["val_r2_null/constant"]
    assert len(nulls) == len({step for step, _ in nulls})


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_resumed_twice_and_becomes_longer_has_each_step_once(
    whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    for checkpoint, epochs in (("batch/step=14", EPOCHS), ("batch/step=8", EPOCHS + 1)):
        run_cli("fit", "-c", config(root, tiny_shards, epochs), "--ckpt_path", root / f"{checkpoint}.ckpt")
    for curves in (board(root), table(root)):
        assert [step for step, _ in curves["train_loss"]] == list(range((EPOCHS + 1) * STEPS_AN_EPOCH))
        assert [step for step, _ in curves["val_loss"]] == [9, 19, 29]
        for tag, points in curves.items():
            assert tag in BESIDE or len(points) == len({step for step, _ in points}), tag


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    for kind in ("batch", "validation", "epoch"):
        shutil.rmtree(root / kind)
    (root / "heads.csv").unlink()  # of a run's end
    run_cli("fit", "-c", config(root, tiny_shards), "--ckpt_path", "last")
    assert_same(board(root), board(whole))
    assert_same(table(root), table(whole))


@pytest.mark.filterwarnings("ignore")
def test_a_validation_deletes_nothing(whole: Path, tmp_path: Path, tiny_shards: Path) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    before = {path.name: path.read_bytes() for path in (root / "board").glob("events*")}
    path = config(root, tiny_shards)
    content = yaml.safe_load(path.read_text())
    content["trainer"]["logger"] = content["trainer"]["logger"][0]
    run_cli("validate", "-c", write_config(path, content), "--ckpt_path", root / "batch/step=4.ckpt")
    after = {path.name: path.read_bytes() for path in (root / "board").glob("events*")}
    assert before and {name: after[name] for name in before} == before


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_refused_leaves_the_curves_alone(
    whole: Path, tmp_path: Path, tiny_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "root"))
    options = ("--model.init_args.hidden", "16", "--ckpt_path", root / "batch/step=4.ckpt")
    assert "now 16" in refused(capsys, "fit", "-c", config(root, tiny_shards), *options)
    assert table(root) == table(whole) and board(root) == board(whole)


def test_an_event_file_that_is_cut_off_keeps_what_is_whole(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path, name="", version="")
    for step in range(4):
        first.experiment.add_scalar("loss", step, step)
    first.experiment.close()
    path = next(tmp_path.glob("events*"))
    path.write_bytes(path.read_bytes()[:-3])
    second = TensorBoardLogger(tmp_path, name="", version="")
    callback = ResumedCurves([second])
    second.experiment.add_scalar("early", 1.0, 9)  # its file has begun when the checkpoint is read
    callback.on_load_checkpoint(None, None, {"global_step": 2})  # type: ignore[arg-type]
    second.experiment.add_scalar("loss", 7, 1)
    callback.on_fit_end(None, None)  # type: ignore[arg-type]
    second.experiment.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 7)]
    assert len(events.Scalars("early")) == 1


def test_an_event_file_that_was_deleted_since_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    callback = ResumedCurves([TensorBoardLogger(tmp_path, name="", version="")])
    (tmp_path / "events.out.tfevents.1").unlink()
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
