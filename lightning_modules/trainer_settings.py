"""Settings of the Trainer and of the command line that a module cannot work with, refused in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.checkpoint_io import read_checkpoint
from smartkv.errors import SmartKVError

SINGLE = "32-true"  # Lightning's name of float32


@contextmanager
def lightning_refusals() -> Iterator[None]:
    """Context manager that raises what Lightning itself refuses as a SmartKVError, in one line.

    Lightning has an exception of its own for settings, and for some of them raises a ValueError. One of a library that
    Lightning calls passes through.

    Raises:
        SmartKVError: Lightning refused a setting.
    """
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        if not isinstance(error, MisconfigurationException) and not _raised_by_lightning(error):
            raise
        raise SmartKVError(" ".join(str(error).split())) from error


def _raised_by_lightning(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lightning.")


def check_subcommand(module: L.LightningModule, subcommand: str, checkpoint: str | None) -> None:
    """Check that a module has what a subcommand of the command line runs.

    Args:
        module: the module of the config.
        subcommand: fit, validate, test or predict.
        checkpoint: what `--ckpt_path` gives.

    Raises:
        SmartKVError: it has not, or it reads no checkpoint.
    """
    steps = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    own = [name for name, step in steps.items() if getattr(type(module), step) is not getattr(L.LightningModule, step)]
    if subcommand not in own:
        raise SmartKVError(
            f"{type(module).__name__} is for {' and '.join(own)}, not for {subcommand}: `python -m eval` measures "
            "gates and adapters on test texts"
        )
    if subcommand == "predict" and checkpoint is not None:
        raise SmartKVError(
            "a harvest has no checkpoints: without --ckpt_path the same command goes on where it stopped"
        )


def check_precision(trainer: Any, allowed: tuple[str, ...], advice: str) -> None:
    """Check the Trainer's precision.

    Args:
        trainer: the Trainer.
        allowed: Lightning's names of the precisions that work.
        advice: what to do, for the message.

    Raises:
        SmartKVError: the precision is another one.
    """
    if trainer.precision not in allowed:
        raise SmartKVError(f"trainer.precision must be {' or '.join(allowed)} here, got {trainer.precision}: {advice}")


def check_batches(trainer: Any) -> None:
    """Check the Trainer's limits of batches and validations.

    Raises:
        SmartKVError: `overfit_batches` is set, a limit leaves nothing to train, or a callback waits for figures of
            validations that never come.
    """
    if trainer.overfit_batches:
        raise SmartKVError(
            f"trainer.overfit_batches must be 0, got {trainer.overfit_batches}: batches are drawn by steps. Give fewer "
            "windows, or limit_train_batches and limit_val_batches"
        )
    limits = ("max_epochs", "max_steps", "limit_train_batches")
    if none := [name for name in limits if getattr(trainer, name) == 0]:
        raise SmartKVError(
            f"trainer.{none[0]} is 0, so nothing would be trained: give at least 1, or leave it out; `validate` "
            "measures without training"
        )
    every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
    if trainer.limit_val_batches == 0:
        reason = "limit_val_batches 0"
    elif every is not None and epochs is not None and 0 <= epochs < every:
        reason = f"check_val_every_n_epoch {every} in a run of {epochs}"
    else:
        return
    waiting = [c for c in trainer.callbacks if isinstance(c, EarlyStopping | ModelCheckpoint) and c.monitor]
    if waiting:
        names = ", ".join(f"{type(callback).__name__} for {callback.monitor}" for callback in waiting)
        raise SmartKVError(
            f"with {reason} there is no validation, but callbacks wait for its figures ({names}): allow validations, "
            "or leave out these callbacks"
        )


def best_checkpoint(last: Path | str, callbacks: list[Any]) -> str:
    """Find the best checkpoint of a run that has ended or was killed, for `--ckpt_path best`.

    Lightning knows it only in the process that trained. The run's last checkpoint remembers it.

    Args:
        last: the run's last checkpoint.
        callbacks: the ModelCheckpoints of the config.

    Returns:
        The path of the best checkpoint.

    Raises:
        SmartKVError: the last checkpoint remembers none, or it is gone.
    """
    states = read_checkpoint(last).get("callbacks", {})
    for callback in callbacks:
        path = states.get(callback.state_key, {}).get("best_model_path")
        if path and callback.monitor:
            found = next((p for p in (Path(path), Path(last).parent / Path(path).name) if p.is_file()), None)
            if found is None:
                raise SmartKVError(f"the best checkpoint {path} is gone: give 'last', or the path of another one")
            return str(found)
    raise SmartKVError(f"{last} knows no best checkpoint, because no ModelCheckpoint monitors a figure: give 'last'")
