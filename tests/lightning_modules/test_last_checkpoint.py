"""`last.ckpt` is of the run's last validation and of its end, whichever checkpoint is the best."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.lifespan_shards import LifespanShards
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.gates import LifespanGates
from tests.lightning_fixtures import STEPS_AN_EPOCH, gates_config

pytestmark = pytest.mark.filterwarnings("ignore")


def fit(root: Path, shards: Path, steps: int, **saving: Any) -> L.Trainer:
    """A fit whose first validation has the largest loss."""
    config = gates_config(shards, root)
    best = ModelCheckpoint(root, "{step}", monitor="val_loss", mode="max", enable_version_counter=False, **saving)
    settings = {"enable_checkpointing": True, "logger": False, "callbacks": [best], "max_steps": steps}
    trainer = L.Trainer(**config["trainer"] | settings | {"max_epochs": -1}, plugins=[AtomicCheckpointIO()])
    module, data = (LifespanGates(**config["model"]["init_args"]), LifespanShards(**config["data"]["init_args"]))
    trainer.fit(module, None, None, data, "last", weights_only=True)
    return trainer


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("beyond", [0, 3], ids=["ends with a validation", "ends between validations"])
def test_it_is_of_the_last_step_although_an_earlier_one_is_best(beyond: int, tmp_path: Path, tiny_shards: Path) -> None:
    steps = 2 * STEPS_AN_EPOCH + beyond
    fit(tmp_path, tiny_shards, steps, save_last=True)
    best, last = sorted(tmp_path.glob("*.ckpt"), reverse=True)
    assert (best.name, last.name) == (f"step={STEPS_AN_EPOCH}.ckpt", "last.ckpt")
    assert state(last)["global_step"] == steps and len(state(last)["loss_history"]) == 2


def test_a_longer_run_goes_on_from_it(tmp_path: Path, tiny_shards: Path) -> None:
    fit(tmp_path / "twice", tiny_shards, 2 * STEPS_AN_EPOCH, save_last=True)
    fit(tmp_path / "twice", tiny_shards, 3 * STEPS_AN_EPOCH, save_last=True)
    fit(tmp_path / "once", tiny_shards, 3 * STEPS_AN_EPOCH, save_last=True)
    twice, once = (state(tmp_path / name / "last.ckpt") for name in ("twice", "once"))
    assert twice["global_step"] == once["global_step"] == 3 * STEPS_AN_EPOCH
    assert len(twice["loss_history"]) == len(once["loss_history"]) == 3


@pytest.mark.parametrize("asked", [False, "link"])
def test_none_is_written_where_another_is_asked_for(asked: bool | str, tmp_path: Path, tiny_shards: Path) -> None:
    fit(tmp_path, tiny_shards, 2 * STEPS_AN_EPOCH, save_last=asked)
    best = tmp_path / f"step={STEPS_AN_EPOCH}.ckpt"
    assert {path.resolve() for path in tmp_path.glob("*.ckpt")} == {best}
