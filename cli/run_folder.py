"""The folder of a run, `out`: all that a run writes lies in it, and no run replaces another one's result unasked."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks import AdapterExport, GateExport, HeadDashboard
from smartkv.errors import SmartKVError


def root_of(config: Namespace, args: Sequence[str]) -> str | None:
    """Return the folder of a run; None: the config names none.

    On the command line `--trainer.default_root_dir`, the name that version 0.1 had, is another word for `--out`. What
    stands there goes before what stands in files, and in files the old name goes before the new one.

    Args:
        config: parsed config of the subcommand.
        args: the command line.

    Raises:
        SmartKVError: both names are given on the command line, with different folders.
    """
    out, old = config.get("out"), config.trainer.get("default_root_dir")
    typed = [name for name in ("out", "trainer.default_root_dir") if _is_typed(name, args)]
    if len(typed) == 2 and out != old:
        raise SmartKVError(f"--out is {out}, --trainer.default_root_dir {old}: give --out alone")
    root = out if typed == ["out"] else old or out
    return None if root is None else str(root)


def _is_typed(name: str, args: Sequence[str]) -> bool:
    return any(argument == f"--{name}" or argument.startswith(f"--{name}=") for argument in args)


def place_in_folder(config: Namespace, root: str) -> None:
    """Set every folder of a run that its config leaves open; callbacks of SmartKV find theirs in the Trainer's folder.

    Args:
        config: parsed config of the subcommand, changed in place.
        root: the folder of the run.
    """
    trainer = config.trainer
    trainer.default_root_dir = root
    if trainer.get("logger") in (None, True):
        # no folder a version: a resumed run continues its curves
        curves = Namespace(save_dir=root, name="", version="", default_hp_metric=False)
        trainer.logger = Namespace(class_path="lightning.pytorch.loggers.TensorBoardLogger", init_args=curves)
    listed = trainer.get("callbacks") or []
    for callback in listed if isinstance(listed, list) else [listed]:
        settings = callback.get("init_args")
        if callback.class_path.endswith(".ModelCheckpoint") and settings and settings.get("dirpath") is None:
            settings.dirpath = str(Path(root) / "checkpoints")
    data = config.get("data")
    if data and data.class_path.endswith(".DocumentWindows") and data.init_args.get("out") is None:
        data.init_args.out = root


def results(trainer: L.Trainer) -> list[Path]:
    """Return the files that an earlier fit left where this one writes its result: checkpoints, exports, `heads.csv`.

    The curves are a result only of a run that writes nothing else.
    """
    files = list(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
    makers = [each for each in trainer.callbacks if isinstance(each, GateExport | AdapterExport | HeadDashboard)]  # type: ignore[attr-defined]
    for maker in makers:
        files += maker.results(trainer)
    for folder in checkpoint_folders(trainer):
        files += folder.glob("*.ckpt")
    return files if makers or trainer.checkpoint_callbacks else curves(trainer)


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Return the folders into which this run writes checkpoints."""
    saving = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    return [Path(each.dirpath) for each in saving if each.dirpath]


def curves(trainer: L.Trainer) -> list[Path]:
    """Return the files of curves in the folders of this run's loggers."""
    files: list[Path] = []
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            folder = Path(logger.log_dir)
            files += [*folder.glob("events.out.tfevents.*"), *folder.glob("metrics.csv")]
    return files


class FreshStart(L.Callback):
    """Callback that deletes what an earlier run left, once this one has all it needs to begin.

    Args:
        files: to delete. Files of this run are not among them: its curves begin earlier than its first step.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete the files."""
        for file in self.files:
            file.unlink(missing_ok=True)


def begin(trainer: L.Trainer, checkpoint: str | Path | None, overwrite: bool) -> None:
    """Refuse a fit that would replace another one's result, and let a new one begin in a clean folder.

    Args:
        trainer: of the fit, before it starts.
        checkpoint: path of the checkpoint that is resumed; None: the run begins anew.
        overwrite: the result may be replaced.

    Raises:
        SmartKVError: the folder holds a result, and the run neither resumes a checkpoint of that folder nor overwrites.
    """
    own = {folder.resolve() for folder in [Path(trainer.default_root_dir), *checkpoint_folders(trainer)]}
    if checkpoint is not None and Path(checkpoint).resolve().parent in own:
        if overwrite:
            raise SmartKVError("--overwrite begins anew, --ckpt_path resumes this folder's run: give one of them")
        return
    found = results(trainer)
    if found and not overwrite:
        raise SmartKVError(
            f"{found[0].parent} holds the result of another run ({found[0].name}): resume that run with "
            "--ckpt_path last, give this one a folder of its own with --out, or replace the old result with --overwrite"
        )
    trainer.callbacks.append(FreshStart([*found, *curves(trainer)]))  # type: ignore[attr-defined]
