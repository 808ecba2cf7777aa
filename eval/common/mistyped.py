"""One line for what was mistyped on a command line or in a config: the key, what is wrong, and the nearest name."""

import inspect
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from smartkv.errors import SmartKVError

_NOT_ACCEPTED = re.compile(r"(?:Option '(\S+)' is not accepted|does not accept option '(\S+)')")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_COMMAND = re.compile(r"argument subcommand: invalid choice: '?([^\s']*)'? \(choose from (.*)\)")
_FRAME = re.compile(  # lines of jsonargparse around the cause
    r"Does not validate against|Subtypes: |Errors:|Expected a <class 'NoneType'>|Given value type: "
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with(out)? |Expected a path but"
)
_LONGEST = 80  # characters of a value in a message


class OneLineErrors:
    """Mixin of jsonargparse's parsers, whose errors become a SmartKVError of one line."""

    exit_on_error: bool
    _actions: list[Any]

    def known_names(self, command: str | None) -> tuple[list[str], list[str]]:
        """Return the names among which the nearest are looked for.

        Args:
            command: of which the message is; None: of this parser.

        Returns:
            The options, and the classes that a config may name.
        """
        parsers = [
            each for action in self._actions if isinstance(action.choices, dict) for each in action.choices.items()
        ]
        own = next((parser for name, parser in parsers if name == command), self)
        return [action.dest for action in own._actions], []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the error.

        Raises:
            SmartKVError: from the parser of a command; it names the key, and for an unknown name the nearest known.
            ArgumentError: from one that jsonargparse makes for a part of a config, whose message goes into that one.
        """
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        command = re.match(r"Subcommand '(\S+)' ", message)
        raise SmartKVError(one_line(message, *self.known_names(command and command[1]))) from ex


class OneLineParser(OneLineErrors, ArgumentParser):
    """Parser of functions as commands, whose errors are one line."""


def one_line(message: str, options: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Return jsonargparse's message as one line.

    Args:
        message: of several lines, in which each level of a config repeats its whole content.
        options: names of options and keys that are known.
        classes: names that a `class_path` may have without their module.

    Returns:
        The key, what is wrong with it, and for an unknown name the nearest known ones.
    """
    if unknown := re.match(r"Unrecognized arguments: (.*)", message):
        names = [name.partition("=")[0] for name in unknown[1].split() if name.startswith("-")]
        return "; ".join(_unknown(name, options) for name in names) or f"unknown argument {unknown[1]}"
    if command := _NO_COMMAND.match(message):
        known = re.findall(r"[\w-]+", command[2])
        near = get_close_matches(command[1], known, n=2, cutoff=0.6)
        return f"unknown command {command[1]}" + (_did_you_mean(near) or f": expected one of {', '.join(known)}")
    if missing := re.match(r"Option '(?:\w+\.)?([\w.]+)' is required", message):
        return f"--{missing[1]} is required, and was not given"
    if none := re.match(r'expected "subcommand" to be one of (.*), but', message):
        return f"expected a command, one of {none[1]}, got none: --help lists them"
    if "Errors:" not in message and not re.match(r'Parser key "[^"]*":\n', message):
        cause = " ".join(message.split())
        if unknown := _NOT_ACCEPTED.search(cause):
            return _unknown(unknown[1] or unknown[2], options)
        return re.sub(r'Parser key "([^"]*)": ', r"\1: ", cause)
    return _of_a_config(message, options, classes)


def _of_a_config(message: str, options: Sequence[str], classes: Sequence[str]) -> str:
    """Return the line for a key of a config, whose levels stand one below the other."""
    keys, cause, given, own = [], "", "", ""
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        if key := re.fullmatch(r'Parser key "(.*)":', text):
            keys.append(key[1])
        elif cls := re.fullmatch(r"Problem with given class_path '(.*)':", text):
            own = cls[1]
            keys += [own.rpartition(".")[2]] if keys == ["trainer.callbacks"] else []
        elif value := re.match(r"Given value: (.*)", text):
            given = given or value[1]  # the innermost comes first
        elif not cause and text and not _FRAME.match(text):
            cause = text
    where = ".".join(keys)
    if nested := re.match(r"Unrecognized arguments: --(.*)", cause):
        return _unknown(f"{where}.{nested[1].partition('=')[0]}", options)
    if unknown := _NOT_ACCEPTED.search(cause):
        return _unknown(f"{where}.{unknown[1] or unknown[2]}", [*options, *_arguments(own, where)])
    if no_class := _NO_CLASS.search(cause):
        near = get_close_matches(no_class[1], classes, n=2, cutoff=0.5)
        return f"{where}: there is no class {no_class[1]}" + _did_you_mean(near)
    cause, _, got = cause.partition(". Got value: ")
    cause = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", cause).replace("Expected a typing.Literal", "Expected one of ")
    cause = cause.replace("Expected a int", "Expected an int")
    got = got or ("" if re.match(r"NestedArg|Namespace|[\[{]", given) else given)
    cause = f"{where}: {cause[:1].lower()}{cause[1:]}" if where else cause
    return cause + (f", got {got[:_LONGEST]}" if got else "")


def _arguments(class_path: str, where: str) -> list[str]:
    """Return the keys of a class in a config, which its parser does not list."""
    if not class_path:
        return []
    return [f"{where}.{name}" for name in inspect.signature(resolve_name(class_path)).parameters]


def _unknown(name: str, options: Sequence[str]) -> str:
    """Return the message for an unknown option `--name` or key `name`."""
    dashes = "--" if name.startswith("--") else ""
    bare = name.removeprefix("--").replace(".init_args.", ".")
    known = [option for option in dict.fromkeys(options) if not option.endswith("help")]
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
