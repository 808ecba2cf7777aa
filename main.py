"""SmartKV on the Lightning CLI.

python main.py predict -c configs/harvest/smollm2.yaml   # text -> shards of keys and lifespans
python main.py fit     -c configs/gates/smollm2.yaml     # shards -> gates
"""

import logging
import os
import warnings
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # blocks are memory-mapped: none needed
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*infer the batch indices.*")  # a shard carries its own place
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())

import lightning as L  # noqa: E402
from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningCLI  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: E402

import callbacks  # noqa: F401, E402 - these three are imported so that configs name classes without their module
import datamodules  # noqa: F401, E402
import lightning_modules  # noqa: F401, E402
from lightning_modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint  # noqa: E402
from smartkv.errors import SmartKVError, one_line_errors  # noqa: E402
from smartkv.io.hub import limit_hub_waiting  # noqa: E402
from smartkv.io.locks import lock_folder  # noqa: E402


class CLI(LightningCLI):
    """Lightning's, with one run at a time in a folder, and checkpoints that are whole and hold nothing but numbers."""

    def _parse_ckpt_path(self) -> None:
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and Path(path).is_file():
            read_checkpoint(path)  # or the CLI, which looks into it, would trip over it
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        _refuse_misfits("", self.config[self.subcommand])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # no other was asked for
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    @rank_zero_only
    def before_fit(self) -> None:
        lock_folder(self.trainer.default_root_dir)

    @rank_zero_only
    def before_predict(self) -> None:
        lock_folder(self.datamodule.out)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        if arguments.get("ckpt_path") == "last":
            arguments["ckpt_path"] = self._last()
        return arguments

    def _last(self) -> str:
        """`last`, or what SLURM's signal left (`hpc_ckpt_*`) where that is newer: Lightning does not look there."""
        signalled = set(Path(self.trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
        found = set(signalled)
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                found |= {Path(path) for path in callback._find_last_checkpoints(self.trainer)}
        newest = max(found, key=os.path.getmtime, default=None)
        return str(newest) if newest in signalled else "last"


def _refuse_misfits(name: str, content: Any) -> None:
    """jsonargparse takes null for a class's setting of any type, and anything for a group of settings."""
    if isinstance(content, list):
        for part in content:
            _refuse_misfits(name, part)
    if not isinstance(content, Namespace):
        return
    if "class_path" in content and content.get("init_args"):
        hints: dict[str, Any] = {}
        with suppress(NameError):  # of a class that names types which only type checkers see
            hints = get_type_hints(resolve_name(content.class_path).__init__)
        for key, value in vars(content.init_args).items():
            if value is None and key in hints and type(None) not in get_args(hints[key]):
                raise SmartKVError(f"{name}.{key} must not be null".lstrip("."))
            if is_dataclass(hints.get(key)) and not isinstance(value, Namespace):
                keys = ", ".join(field.name for field in fields(hints[key]))
                raise SmartKVError(f"{name}.{key} must have keys of its own ({keys}), not be {value!r}".lstrip("."))
    for key, value in vars(content).items():
        _refuse_misfits(name if key == "init_args" else f"{name}.{key}".lstrip("."), value)


def main(args: list[str] | None = None) -> None:
    """Run one subcommand; `args` default to the command line.

    A user's mistake ends with one line on stderr and status 2.
    """
    with one_line_errors():
        limit_hub_waiting()
        CLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=args,
        )


if __name__ == "__main__":
    main()
