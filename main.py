"""Command line of SmartKV's training, on LightningCLI.

python main.py predict -c configs/harvest/smollm2.yaml   # text -> shards of keys and lifespans
python main.py fit     -c configs/gates/smollm2.yaml     # shards -> gates

A second `-c` is an overlay: its settings replace those of the first file, lists as a whole. Any key of a config can be
set on the command line; one of a callback by its class, such as `--trainer.callbacks.GateExport.dtype float16`.
"""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from eval.common.interrupts import (
    STATUS,
    end_quietly,
    interrupted_line,
    is_helper_process,
    is_step,
    quiet_interrupts,
    typed_command,
)

if __name__ == "__main__":  # before the imports that take seconds
    quiet_interrupts(resumes=False)
    if is_helper_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # blocks are memory-mapped
warnings.filterwarnings("ignore", message=".*LeafSpec.*")
warnings.filterwarnings("ignore", message=".*infer the batch indices.*")  # a shard knows its windows
# figures of gates are summed over processes by their metrics, which Lightning does not see
warnings.filterwarnings("ignore", message=r".*self\.log\('(train|val)_(loss|r2)(_\w+)?(/\w+)?', \.\.\., sync_dist=True")
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # `begin` asks about it
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: not any(word in record.getMessage() for word in ("Tip:", "Detected KeyboardInterrupt"))
)

import lightning as L  # noqa: E402
from jsonargparse import Namespace  # noqa: E402
from lightning.pytorch.accelerators import CPUAccelerator  # noqa: E402
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # noqa: E402

import lightning_modules  # noqa: F401, E402
from callbacks import AdapterExport, FitProgress, GateExport, RunConfig  # noqa: E402
from cli.moved_configs import refuse_moved_configs  # noqa: E402
from cli.options import Parser, one_line_of_config, set_callbacks, split_callback_settings  # noqa: E402
from cli.run_folder import begin, place_in_folder, root_of  # noqa: E402
from datamodules import LifespanShards  # noqa: E402
from lightning_modules.checkpoint_io import AtomicCheckpointIO, read_checkpoint  # noqa: E402
from lightning_modules.trainer_settings import best_checkpoint, check_subcommand, lightning_refusals  # noqa: E402
from smartkv.errors import SmartKVError, one_line_errors  # noqa: E402
from smartkv.io.hub import limit_hub_waiting  # noqa: E402
from smartkv.io.locks import lock_folder  # noqa: E402
from smartkv.shards.manifest import Manifest  # noqa: E402

FEW = 8  # processes that any CPU may be asked for


class CLI(LightningCLI):
    """LightningCLI with one folder for a run, and checkpoints that are written atomically and run no code."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the folder of the run."""
        parser.add_argument("--out", type=str | None, default=None, help="folder of the run, for all that it writes")
        parser.add_argument(
            "--overwrite", type=bool, nargs="?", const=True, default=False, help="replace another run's result there"
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line, with settings of callbacks by the name of their class."""
        self.typed = list(sys.argv[1:] if args is None else args)
        if len(self.typed) == 1 and self.typed[0] in self.subcommands():
            example = {"predict": "configs/harvest/smollm2.yaml"}.get(self.typed[0], "configs/gates/smollm2.yaml")
            raise SmartKVError(f"{self.typed[0]} needs a config, such as -c {example} (-c may be given several times)")
        rest, settings = split_callback_settings(self.typed)
        plain = [argument for argument in rest if settings and not argument.startswith("--print_config")]
        self.config = parser.parse_args(plain if settings else rest)
        if settings:
            listed = self.config[self.config.subcommand].trainer.callbacks
            self.config = parser.parse_args([*rest, "--trainer.callbacks", json.dumps(set_callbacks(listed, settings))])

    def _parse_ckpt_path(self) -> None:
        # LightningCLI would put the checkpoint's settings in place of those of the config and the command line; here
        # the module compares them (`Resuming`), so that none is replaced silently
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and Path(path).is_file():
            read_checkpoint(path)  # a damaged one is told before the model is built
        elif path and path not in ("last", "best", "hpc") and ":" not in path and not Path(path).exists():  # no URL
            raise SmartKVError(f"there is no checkpoint {path}: give the path of one, or 'last'")

    def before_instantiate_classes(self) -> None:
        """Refuse settings that jsonargparse accepts although their type forbids them, and give the run its folder."""
        config = self.config[str(self.subcommand)]
        _refuse_misfits("", config)
        self.overwrite, config.overwrite = config.overwrite, False  # a saved config must not overwrite its own run
        self.written = self.config.clone()  # to be saved: another `--out` moves all that it leaves open
        if root := root_of(config, self.typed):
            place_in_folder(config, root)
        elif self.subcommand == "predict" and "out" in (data := config.data.init_args) and data.out is None:
            raise SmartKVError("there is no folder for the shards: give one with --out")

    def after_instantiate_classes(self) -> None:
        """Refuse a subcommand that the module has nothing for."""
        check_subcommand(self.model, str(self.subcommand), self._get(self.config_init, "ckpt_path"))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the Trainer, with atomic checkpoints unless the config has a checkpoint plugin of its own."""
        self.config = self.written
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # Lightning's default
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.fast_dev_run:  # type: ignore[attr-defined] # Lightning writes last.ckpt all the same
            trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Checkpoint)]  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback) is RichProgressBar:  # Lightning's default, and what configs of version 0.1 name
                callback.__class__ = FitProgress
        cores = os.cpu_count() or 1
        if isinstance(trainer.accelerator, CPUAccelerator) and trainer.num_devices > max(FEW, cores):
            raise SmartKVError(f"trainer.devices is {trainer.num_devices}, but this machine has {cores} CPU cores")
        return trainer

    @rank_zero_only
    def before_fit(self) -> None:
        """Lock the run's folder, and refuse to replace another run's result."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined] # it writes nothing
            return
        if isinstance(self.datamodule, LifespanShards):
            Manifest.read(self.datamodule.shards)  # before other processes are started
        lock_folder(self.trainer.default_root_dir)
        given = self._get(self.config_init, "ckpt_path")
        begin(self.trainer, self._newest() if given == "last" else given, self.overwrite)

    @rank_zero_only
    def after_fit(self) -> None:
        """Print where the result is, what it achieved, and what comes next."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            print("fast_dev_run: nothing was written")
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GateExport | AdapterExport):
                print(*callback.summary(self.trainer), sep="\n")

    @rank_zero_only
    def before_predict(self) -> None:
        """Lock the folder of the shards."""
        self.datamodule.overwrite = self.overwrite
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            lock_folder(self.datamodule.out)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as error:  # which Lightning makes of Ctrl-C
            if self.trainer.interrupted:
                raise Interrupted(self._next_command()) from error
            raise

    def _next_command(self) -> tuple[list[str], bool]:
        """Return the arguments that go on with this run, and whether they do not begin again."""
        args = _without(self.typed, "overwrite", "ckpt_path")
        if self.subcommand == "predict":
            return args, True
        newest = self._newest() if self.subcommand == "fit" else None
        if newest is None:
            return self.typed, False
        return [*args, "--ckpt_path", "last" if Path(newest).stem.startswith("last") else newest], True

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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a run that knows how to go on.

    Args:
        command: arguments of the next command, and whether it goes on where this one stopped.
    """

    def __init__(self, command: tuple[list[str], bool]) -> None:
        super().__init__()
        self.command = command


def _without(args: Sequence[str], *names: str) -> list[str]:
    """Return a command line without some options and their values."""
    kept, skip = [], False
    for argument in args:
        name, assigned, _ = argument.partition("=")
        if name.removeprefix("--") in names and name.startswith("--"):
            skip = not assigned
        elif skip and not argument.startswith("-"):
            skip = False
        else:
            kept.append(argument)
            skip = False
    return kept


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


def main(args: list[str] | None = None) -> None:
    """Run one subcommand of LightningCLI.

    A user's mistake ends with one line on stderr and exit status 2.

    Args:
        args: arguments after the program's name; None: those of the command line.
    """
    try:
        with one_line_errors(), lightning_refusals():
            _run(args)
    except KeyboardInterrupt as interrupt:
        options, resumes = interrupt.command if isinstance(interrupt, Interrupted) else (None, False)
        command = typed_command(args, ["python", "main.py"])
        if options is not None:
            command[len(command) - len(sys.argv[1:] if args is None else args) :] = options
        if not is_step():
            print(f"\n{interrupted_line(command, resumes)}", file=sys.stderr)
        sys.exit(STATUS)


def _run(args: list[str] | None) -> None:
    refuse_moved_configs(sys.argv[1:] if args is None else args)
    limit_hub_waiting()
    try:
        CLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_class=Parser,
            args=args,
        )
    except ValueError as error:  # jsonargparse's word for a class that refused its settings
        if "Errors:" not in str(error):
            raise
        raise SmartKVError(one_line_of_config(str(error))) from error


if __name__ == "__main__":
    try:
        main()
    finally:
        end_quietly()
