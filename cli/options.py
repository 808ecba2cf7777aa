"""Options of main.py: settings of callbacks by class name, and one line with the nearest name for a mistyped one."""

import inspect
import re
from collections.abc import Sequence
from typing import Any

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

import callbacks
import datamodules
import lightning_modules
from eval.common.mistyped import OneLineErrors, one_line
from smartkv.errors import SmartKVError
from smartkv.gates import objectives
from smartkv.sparsity import dropping, keep_ratio

_CALLBACK = re.compile(
    r"--trainer\.callbacks\.(?P<name>[A-Z]\w*|\d+)\.(?:init_args\.)?(?P<key>[a-z_][\w.]*)(?:=(?P<value>.*))?", re.DOTALL
)


class Parser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, whose errors are a SmartKVError of one line."""

    def known_names(self, command: str | None) -> tuple[list[str], list[str]]:
        """Return the options, those of the subcommands and the keys of SmartKV's classes; and the classes."""
        parsers = [self, *(each for action in self._actions for each in _parsers_of(action))]
        options = [action.dest for parser in parsers for action in parser._actions]
        return [*options, *_settings()], _classes()


def _parsers_of(action: Any) -> list[Any]:
    """Return the parsers of the subcommands, if an action has such."""
    return list(action.choices.values()) if isinstance(action.choices, dict) else []


# -- settings of callbacks --------------------------------------------------------------------------------------------


def split_callback_settings(args: Sequence[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Take the options `--trainer.callbacks.CLASS.KEY VALUE` out of a command line.

    jsonargparse knows none of them: it sets keys of the last callback alone.

    Args:
        args: the command line after the program's name.

    Returns:
        The other arguments, and (class name or number, key, value) of each option.

    Raises:
        SmartKVError: an option without a value.
    """
    rest, settings = [], []
    queue = list(args)
    while queue:
        argument = queue.pop(0)
        match = _CALLBACK.fullmatch(argument)
        if not match:
            rest.append(argument)
            continue
        if match["value"] is None and not queue:
            raise SmartKVError(f"{argument} needs a value")
        settings.append((match["name"], match["key"], queue.pop(0) if match["value"] is None else match["value"]))
    return rest, settings


def set_callbacks(callbacks: Any, settings: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Return a config's callbacks with settings changed.

    Args:
        callbacks: `trainer.callbacks` of the parsed config: a list, one callback, or None.
        settings: (class name or number, key, value) of each change; see `split_callback_settings`.

    Raises:
        SmartKVError: the config has no such callback, or several.
    """
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    changed = [each.as_dict() if isinstance(each, Namespace) else dict(each) for each in listed]
    names = [each["class_path"].rpartition(".")[2] for each in changed]
    for name, key, value in settings:
        numbers = [number for number, each in enumerate(names) if name in (each, str(number))]
        if not numbers:
            have = ", ".join(names) or "none"
            raise SmartKVError(f"--trainer.callbacks.{name}.{key}: the config has no callback {name}, it has {have}")
        if len(numbers) > 1:
            options = " or ".join(f"--trainer.callbacks.{number}.{key}" for number in numbers)
            raise SmartKVError(f"--trainer.callbacks.{name}.{key}: the config has several {name}: give {options}")
        place = changed[numbers[0]].setdefault("init_args", {})
        *parents, last = key.split(".")
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[last] = _value(value)
    return changed


def _value(text: str) -> Any:
    """Read a value from the command line as YAML; `1e-3` is a number too, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


# -- messages ---------------------------------------------------------------------------------------------------------


def one_line_of_config(message: str) -> str:
    """Return jsonargparse's message about a config as one line, with the nearest known names."""
    return one_line(message, _settings(), _classes())


def _settings() -> list[str]:
    """Return the keys of all of SmartKV's classes as they stand in a config, such as `model.hidden`."""
    places = [("model", lightning_modules), ("data", datamodules)]
    settings = [f"{key}.{name}" for key, package in places for cls in _public(package) for name in _arguments(cls)]
    settings += [f"trainer.callbacks.{cls.__name__}.{name}" for cls in _public(callbacks) for name in _arguments(cls)]
    return list(dict.fromkeys(settings))


def _classes() -> list[str]:
    """Return the names that a `class_path` may have without their module."""
    ours = [cls for package in (callbacks, datamodules, lightning_modules) for cls in _public(package)]
    parts = [
        cls for module in (objectives, dropping, keep_ratio) for _, cls in inspect.getmembers(module, inspect.isclass)
    ]
    known = [cls.__name__ for cls in [*ours, *parts] if not cls.__name__.startswith("_")]
    return [*known, *(cls.__name__ for cls in _subclasses(L.Callback) if cls.__module__.startswith("lightning"))]


def _subclasses(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(deeper for below in cls.__subclasses__() for deeper in _subclasses(below))]


def _public(package: Any) -> list[type]:
    return [getattr(package, name) for name in package.__all__]


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name not in ("args", "kwargs")]
