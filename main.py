"""Command line of SmartKV's training, on LightningCLI.

python main.py predict -c configs/harvest/smollm2.yaml   # text -> shards of keys and lifespans
python main.py fit     -c configs/gates/smollm2.yaml     # shards -> gates

A second `-c` is an overlay: its settings replace those of the first file, lists as a whole.
"""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # blocks are memory-mapped
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*infer the batch indices.*")  # a shard knows its windows
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())

import lightning as L  # noqa: E402
from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningCLI  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: E402

import callbacks  # noqa: E402 - imported, as the next two, so that configs may name bare classes
import datamodules  # noqa: F401, E402
import lightning_modules  # noqa: F401, E402
from lightning_modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint  # noqa: E402
from lightning_modules.trainer_settings import best_checkpoint, check_subcommand, lightning_refusals  # noqa: E402
from smartkv.errors import SmartKVError, one_line_errors  # noqa: E402
from smartkv.io.hub import limit_hub_waiting  # noqa: E402
from smartkv.io.locks import lock_folder  # noqa: E402

_TUNING, _LIFESPANS, _DISTILLED = "eviction_tuning/base.yaml", "gates/smollm2.yaml", "gates/distilled.yaml"
MOVED_CONFIGS = {  # files of version 0.1 below configs/ -> the base and the overlay that replace them
    "eit/smollm2.yaml": (_TUNING,),
    "eit/smollm2-plain.yaml": (_TUNING, "eviction_tuning/plain.yaml"),
    "eit/smollm2-random.yaml": (_TUNING, "eviction_tuning/random.yaml"),
    "eit/smollm2-window.yaml": (_TUNING, "eviction_tuning/window.yaml"),
    "eit/smollm2-gates.yaml": (_TUNING, "eviction_tuning/gates.yaml"),
    "eit/qwen2.5-0.5b.yaml": (_TUNING, "eviction_tuning/qwen2.5-0.5b.yaml"),
    "eit/qwen3-8b.yaml": (_TUNING, "eviction_tuning/qwen3-8b.yaml"),
    "eit/llama-3.1-8b.yaml": (_TUNING, "eviction_tuning/llama-3.1-8b.yaml"),
    "gates/books.yaml": (_LIFESPANS, "gates/lifespans/books.yaml"),
    "gates/books-post-rope.yaml": (_LIFESPANS, "gates/lifespans/books-post-rope.yaml"),
    "gates/qwen2.5-0.5b.yaml": (_LIFESPANS, "gates/lifespans/qwen2.5-0.5b.yaml"),
    "gates/qwen3-0.6b.yaml": (_LIFESPANS, "gates/lifespans/qwen3-0.6b.yaml"),
    "gates/lists.yaml": (_DISTILLED, "gates/distilled/lists.yaml"),
    "gates/qwen2.5-0.5b-distilled.yaml": (_DISTILLED, "gates/distilled/qwen2.5-0.5b.yaml"),
    "gates/qwen3-0.6b-distilled.yaml": (_DISTILLED, "gates/distilled/qwen3-0.6b.yaml"),
}


class CLI(LightningCLI):
    """LightningCLI with one run at a time per folder and checkpoints that are written atomically and run no code."""

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would put the checkpoint's settings in place of those of the config and the command line; here
        # the module compares them (`Resuming`), so that none is replaced silently
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and Path(path).is_file():
            read_checkpoint(path)  # a damaged one is told before the model is built

    def before_instantiate_classes(self) -> None:
        """Refuse settings that jsonargparse accepts although their type forbids them."""
        _refuse_misfits("", self.config[str(self.subcommand)])

    def after_instantiate_classes(self) -> None:
        """Refuse a subcommand that the module has nothing for."""
        check_subcommand(self.model, str(self.subcommand), self._get(self.config_init, "ckpt_path"))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer, with atomic checkpoints unless the config has a checkpoint plugin of its own."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    @rank_zero_only
    def before_fit(self) -> None:
        """Lock the run's folder."""
        lock_folder(self.trainer.default_root_dir)

    @rank_zero_only
    def before_predict(self) -> None:
        """Lock the folder of the shards."""
        lock_folder(self.datamodule.out)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}
        given = arguments.get("ckpt_path")
        newest = self._newest() if given in ("last", "best") else None
        if newest is None and (given == "best" or (given == "last" and subcommand != "fit")):
            raise SmartKVError(f"--ckpt_path {given}: the folders of this run have no last checkpoint; give a path")
        if given == "last":
            arguments["ckpt_path"] = self._last()
        elif newest is not None:
            arguments["ckpt_path"] = best_checkpoint(newest, self.trainer.checkpoint_callbacks)
        return arguments

    def _last(self) -> str:
        """Return `last`, or the path of a newer checkpoint that SLURM's signal left (`hpc_ckpt_*`).

        Lightning's own search for `last` does not look at these files.
        """
        newest = self._newest()
        return newest if newest and Path(newest).name.startswith("hpc_ckpt_") else "last"

    def _newest(self) -> str | None:
        """Return the path of the newest checkpoint that `last` may mean; None: there is none."""
        found = set(Path(self.trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                found |= {Path(path) for path in callback._find_last_checkpoints(self.trainer)}
        newest = max(found, key=os.path.getmtime, default=None)
        return None if newest is None else str(newest)


def _refuse_misfits(name: str, content: Any) -> None:
    """Raise SmartKVError for a null or a scalar in a setting whose type forbids it.

    jsonargparse accepts null for a class's setting of any type, and any value for a dataclass.

    Args:
        name: dotted key of `content` in the config.
        content: a namespace, list or value of the parsed config.
    """
    if isinstance(content, list):
        for part in content:
            _refuse_misfits(name, part)
    if not isinstance(content, Namespace):
        return
    if "class_path" in content and content.get("init_args"):
        hints: dict[str, Any] = {}
        with suppress(NameError):  # the class names types that only type checkers import
            hints = get_type_hints(resolve_name(content.class_path).__init__)
        for key, value in vars(content.init_args).items():
            if value is None and key in hints and type(None) not in get_args(hints[key]):
                raise SmartKVError(f"{name}.{key} must not be null".lstrip("."))
            if is_dataclass(hints.get(key)) and not isinstance(value, Namespace):
                keys = ", ".join(field.name for field in fields(hints[key]))
                raise SmartKVError(f"{name}.{key} must have keys of its own ({keys}), not be {value!r}".lstrip("."))
    for key, value in vars(content).items():
        _refuse_misfits(name if key == "init_args" else f"{name}.{key}".lstrip("."), value)


def _refuse_moved_configs(args: Sequence[str]) -> None:
    """Raise SmartKVError with the new `-c` options if a config of version 0.1 is given that has moved."""
    for option, value in pairwise(["", *args]):
        path = value.partition("=")[2] if value.startswith(("--config=", "-c=")) else value
        if path == value and option not in ("-c", "--config"):
            continue
        folder, slash, name = Path(path).as_posix().rpartition("configs/")
        if slash and name in MOVED_CONFIGS and not Path(path).exists():
            options = " ".join(f"-c {folder}configs/{new}" for new in MOVED_CONFIGS[name])
            raise SmartKVError(f"{path} has moved: give {options} instead")


def main(args: list[str] | None = None) -> None:
    """Run one subcommand of LightningCLI.

    A user's mistake ends with one line on stderr and exit status 2.

    Args:
        args: arguments after the program's name; None: those of the command line.
    """
    with one_line_errors(), lightning_refusals():
        _refuse_moved_configs(sys.argv[1:] if args is None else args)
        limit_hub_waiting()
        CLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=callbacks.RunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=args,
        )


if __name__ == "__main__":
    main()
