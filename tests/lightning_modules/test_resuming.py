"""A fit that dies at given moments, whichever they are, goes on to what one leaves that did not."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from callbacks import GateExport
from datamodules.lifespan_shards import LifespanShards
from lightning_modules.checkpoint_io import AtomicCheckpointIO
from lightning_modules.gates import LifespanGates
from tests.lightning_fixtures import STEPS_AN_EPOCH, gates_config
from tests.survival.killing import exit_status

HOOKS = (
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_save_checkpoint",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_train_epoch_end",
)
EPOCHS, DIED = 3, 9
LIMIT = {"max_epochs": EPOCHS + 1}  # it stops early


def fit(root: Path, shards: Path, dies: tuple[str, int] | None = None, limit: dict[str, int] = LIMIT) -> None:
    """Start, or go on, in a process of its own; `dies`: at which call of which hook it ends, with nothing put away.
    Without the command line, which takes longer to read a config than these fits take to run."""

    def run() -> None:
        if dies:
            hook, number = dies
            inner, calls = getattr(LifespanGates, hook), iter(range(10**6))

            def last(self: LifespanGates, *args: Any, **kwargs: Any) -> Any:
                if next(calls) == number:
                    os._exit(DIED)
                return inner(self, *args, **kwargs)

            setattr(LifespanGates, hook, last)
        config = gates_config(shards, root, callbacks=[{"class_path": "ModelCheckpoint"}])
        settings = config["trainer"] | limit | {"callbacks": callbacks(root), "logger": False}
        L.seed_everything(config["seed_everything"])
        data = LifespanShards(**config["data"]["init_args"])
        trainer = L.Trainer(**settings, plugins=[AtomicCheckpointIO()])
        trainer.fit(LifespanGates(**config["model"]["init_args"]), None, None, data, "last", weights_only=True)

    assert exit_status(run) in ((DIED, 0) if dies else (0,))  # 0: there are no so many calls


def callbacks(root: Path) -> list[L.Callback]:
    """The gates of the best validation, a stop at the third, and a checkpoint of every batch, validation and epoch."""
    saving = {"save_last": True, "enable_version_counter": False}
    return [
        GateExport(str(root / "export"), "val_loss", "min"),
        EarlyStopping("val_loss", mode="max", patience=EPOCHS - 1),  # the first is the largest
        ModelCheckpoint(root / "batch", every_n_train_steps=1, **saving),
        ModelCheckpoint(root / "validation", monitor="val_loss", save_on_train_epoch_end=False, **saving),
        ModelCheckpoint(root / "epoch", **saving),
    ]


def left(root: Path) -> dict[str, Any]:
    """What the run ends with."""
    last = torch.load(root / "epoch/last.ckpt", weights_only=True)
    stop = next(state for name, state in last["callbacks"].items() if name.startswith("EarlyStopping"))
    return {
        "step": last["global_step"],
        "weights": {name: tensor.tolist() for name, tensor in last["state_dict"].items()},
        "validations": last["loss_history"],  # one entry each
        "stop": stop | {"best_score": float(stop["best_score"])},
        "export": {name: (root / "export" / name).read_bytes() for name in ("config.json", "model.safetensors")},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    root = tmp_path_factory.mktemp("whole")
    fit(root, tiny_shards)
    assert len(left(root)["validations"]) == EPOCHS
    return root


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["early", "late"])
def test_a_fit_that_dies_goes_on_to_the_same_end(
    early: bool, hook: str, whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    """Early: at the first and the last call of the first epoch, and at the first of the next. Late: at later ones."""
    want = left(whole)
    steps = want["step"] // EPOCHS
    if "batch" in hook or "save" in hook:
        calls = (0, steps - 1, steps) if early else (steps + 1, 2 * steps - 1, 2 * steps)
    else:
        calls = (0, 1) if early else (2,)
    for number in calls:
        goes_on_to(want, tmp_path / str(number), tiny_shards, [(hook, number)])


def goes_on_to(
    want: dict[str, Any],
    root: Path,
    shards: Path,
    deaths: Sequence[tuple[str, int]],
    limit: dict[str, int] = LIMIT,
) -> None:
    for death in deaths:
        fit(root, shards, death, limit)
    fit(root, shards, limit=limit)
    found = left(root)
    assert [name for name in want if found[name] != want[name]] == [], deaths


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "deaths",
    [
        [("on_validation_start", 0), ("on_train_batch_end", 1), ("on_train_batch_end", 0)],
        [("on_validation_start", 0), ("on_train_batch_end", 9)],  # twice at the end of an epoch
        [("on_validation_epoch_end", n) for n in (0, 0, 2)] + [("on_train_epoch_end", 0)],  # also at the run's very end
        [("on_train_epoch_end", 1), ("on_save_checkpoint", 4)],
        [("on_train_batch_end", 4), ("on_validation_start", 0), ("on_train_batch_start", 3)],
    ],
)
def test_a_fit_that_dies_again_and_again_goes_on_to_the_same_end(
    deaths: list[tuple[str, int]], whole: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    goes_on_to(left(whole), tmp_path, tiny_shards, deaths)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_of_so_many_steps_that_dies_goes_on_to_the_same_end(tmp_path: Path, tiny_shards: Path) -> None:
    """Between its epochs, and in its last validation, which no step follows."""
    limit = {"max_epochs": -1, "max_steps": 2 * STEPS_AN_EPOCH}
    fit(tmp_path / "whole", tiny_shards, limit=limit)
    deaths = [("on_train_epoch_start", 1), ("on_validation_start", 0)]
    goes_on_to(left(tmp_path / "whole"), tmp_path / "died", tiny_shards, deaths, limit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(20))
def test_a_fit_that_dies_at_random_moments(seed: int, whole: Path, tmp_path: Path, tiny_shards: Path) -> None:
    drawn = random.Random(seed)
    hooks = [drawn.choice(HOOKS) for _ in range(3)]
    deaths = [(hook, drawn.randrange(14 if "batch" in hook or "save" in hook else 2)) for hook in hooks]
    goes_on_to(left(whole), tmp_path, tiny_shards, deaths)
