"""Options of main.py: settings of callbacks by class name, and one line with the nearest name for a mistyped one."""

import inspect
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

import callbacks
import datamodules
import lightning_modules
from smartkv.errors import SmartKVError
from smartkv.gates import objectives
from smartkv.sparsity import dropping, keep_ratio

_CALLBACK = re.compile(
    r"--trainer\.callbacks\.(?P<name>[A-Z]\w*|\d+)\.(?:init_args\.)?(?P<key>[a-z_][\w.]*)(?:=(?P<value>.*))?", re.DOTALL
)
_NOT_ACCEPTED = re.compile(r"(?:Option '(\S+)' is not accepted|does not accept option '(\S+)')")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_FRAME = re.compile(  # lines of jsonargparse around the cause
    r"Does not validate against|Subtypes: |Errors:|Expected a <class 'NoneType'>|Given value type: "
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with(out)? |Expected a path but"
)
_LONGEST = 80  # characters of a value in a message


class Parser(LightningArgumentParser):
    """LightningCLI's parser, whose errors are a SmartKVError of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error.

        Raises:
            SmartKVError: from the parser of a command; it names the key, and for an unknown name the nearest known.
            ArgumentError: from one that jsonargparse makes for a part of a config, whose message goes into that one.
        """
        if not self.exit_on_error:
            super().error(message, ex)
        parsers = [self, *(each for action in self._actions for each in _parsers_of(action))]
        options = [action.dest for parser in parsers for action in parser._actions]
        raise SmartKVError(one_line(message, options)) from ex


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


def one_line(message: str, options: list[str]) -> str:
    """Return jsonargparse's message as one line.

    Args:
        message: of several lines, in which each level of a config repeats its whole content.
        options: the parser's own names.

    Returns:
        The key, what is wrong with it, and for an unknown name the nearest known ones.
    """
    if unknown := re.match(r"Unrecognized arguments: (.*)", message):
        names = [name.partition("=")[0] for name in unknown[1].split() if name.startswith("-")]
        return "; ".join(_unknown(name, options) for name in names) or f"unknown argument {unknown[1]}"
    if "Errors:" not in message:
        cause = " ".join(message.split())
        if unknown := _NOT_ACCEPTED.search(cause):
            return _unknown(unknown[1] or unknown[2], options)
        return re.sub(r'Parser key "([^"]*)": ', r"\1: ", cause)
    keys, cause, given = [], "", ""
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if key := re.fullmatch(r'Parser key "(.*)":', text):
            keys.append(key[1])
        elif cls := re.fullmatch(r"Problem with given class_path '(.*)':", text):
            keys += [cls[1].rpartition(".")[2]] if keys == ["trainer.callbacks"] else []
        elif value := re.match(r"Given value: (.*)", text):
            given = given or value[1]  # the innermost comes first
        elif not cause and text and not _FRAME.match(text):
            cause = text
    where = ".".join(keys)
    if nested := re.match(r"Unrecognized arguments: --(.*)", cause):
        return _unknown(f"{where}.{nested[1].partition('=')[0]}", options)
    if unknown := _NOT_ACCEPTED.search(cause):
        return _unknown(f"{where}.{unknown[1] or unknown[2]}", options)
    if no_class := _NO_CLASS.search(cause):
        near = get_close_matches(no_class[1], _classes(), n=2, cutoff=0.5)
        return f"{where}: there is no class {no_class[1]}" + _did_you_mean(near)
    cause, _, got = cause.partition(". Got value: ")
    cause = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", cause).replace("Expected a typing.Literal", "Expected one of ")
    cause = cause.replace("Expected a int", "Expected an int")
    got = got or ("" if re.match(r"NestedArg|Namespace|[\[{]", given) else given)
    cause = f"{where}: {cause[:1].lower()}{cause[1:]}" if where else cause
    return cause + (f", got {got[:_LONGEST]}" if got else "")


def _unknown(name: str, options: list[str]) -> str:
    """Return the message for an unknown option `--name` or key `name`."""
    dashes = "--" if name.startswith("--") else ""
    bare = name.removeprefix("--").replace(".init_args.", ".")
    known = [option for option in dict.fromkeys([*options, *_settings()]) if not option.endswith("help")]
    parent, _, last = bare.rpartition(".")
    beside = {option.rpartition(".")[2]: option for option in known if parent and option.rpartition(".")[0] == parent}
    anywhere = {option.rpartition(".")[2]: option for option in reversed(known)}
    near = [beside[each] for each in get_close_matches(last, beside, n=2, cutoff=0.6)]
    near = near or [option for option in known if option.rpartition(".")[2] == last]
    top = bare.partition(".")[0]
    if not near and parent and top not in (tops := {option.partition(".")[0] for option in known}):
        near = get_close_matches(top, tops, n=2, cutoff=0.6)
    if not near and not parent:
        near = [anywhere[each] for each in get_close_matches(last, anywhere, n=2, cutoff=0.75)]
    kind = "option" if name.startswith("-") else "key"
    return f"unknown {kind} {dashes}{bare}" + _did_you_mean([f"{dashes}{option}" for option in near[:3]])


def _did_you_mean(near: list[str]) -> str:
    return f": did you mean {' or '.join(near)}?" if near else ""


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
