"""Short and older spellings of commands, flags and keys, rewritten into the ones that the parser knows.

- `presses …` is `compare` with configs/eval/presses.yaml.
- `baselines` takes dashes, a flag without a value and a list of words: `--baselines FP16 INT8 --memory-only`.
- Options that stand in a group have flat names too: `--backbone X` is `--model.backbone X`. The same holds for the keys
  of a YAML file that `--config` names.
"""

import json
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode

from smartkv.errors import SmartKVError

PRESSES = Path(__file__).parents[2] / "configs" / "eval" / "presses.yaml"
BASELINES = "baselines"
MEMORY_ONLY = "--memory-only"
LIST_OF_BASELINES = "--baselines"


def _of(group: str, *names: str) -> dict[str, str]:
    return {name: f"{group}.{name}" for name in names}


MODEL = _of("model", "backbone", "dtype", "device", "trust_remote_code")
MEASURE = _of("measure", "window", "score_from", "seed")
FLAT_NAMES: dict[str, dict[str, str]] = {  # command -> flat name -> the option's place in its group
    "anchors": MODEL | _of("texts", "sources", "split", "windows"),
    "auto": MODEL | MEASURE,
    "baselines": _of("model", "dtype", "device", "trust_remote_code"),
    "budgets": MODEL,
    "calibrate": MODEL,
    "code_completion": MODEL,
    "compare": MODEL
    | MEASURE
    | _of("model", "adapter")
    | _of("measure", "windows_per_document")
    | _of("recall", "haystack")
    | {"calibration_windows": "calibration.windows"},
    "decode": MODEL,
    "generate": MODEL
    | _of("sampling", "max_new_tokens", "temperature", "top_p")
    | _of("calibration", "sources")
    | {"calibration_window": "calibration.window", "calibration_windows": "calibration.windows"},
    "kinds": MODEL | MEASURE | _of("model", "adapter") | _of("measure", "windows_per_document"),
    "longbench": MODEL,
    "lookup": MODEL,
    "needle": MODEL,
    "perplexity": MODEL | MEASURE | _of("texts", "sources", "split", "windows"),
    "reasoning": MODEL,
    "ruler": MODEL,
    "speed": _of("model", "backbone", "dtype", "device"),
}
# groups that also stand for one of their options: `baselines --model gpt2`, `compare --calibration '[{name: pg19}]'`
SHORT_GROUPS = {"model": "model.backbone", "calibration": "calibration.sources"}


def expand_aliases(args: list[str]) -> list[str]:
    """Rewrite a command line into the spelling that the parser knows; other arguments are left as they are.

    Args:
        args: the command line after `python -m eval`.

    Raises:
        SmartKVError: a file of `--config` gives one option by both of its names.
    """
    if args and args[0] == "presses":
        args = ["compare", "--config", str(PRESSES), *args[1:]]
    if args and args[0] == BASELINES:
        args = [BASELINES, *_baselines(args[1:])]
    command = _command(args)
    return _grouped(args, command) if command in FLAT_NAMES else args


def _command(args: list[str]) -> str:
    """Return the command, which may stand behind a `--config` of its own; "" where there is none."""
    rest = list(args)
    while rest and rest[0].startswith("--config"):
        del rest[: 1 if "=" in rest[0] else 2]
    return rest[0] if rest else ""


def _baselines(args: list[str]) -> list[str]:
    """Rewrite dashes, the flag and the list of words."""
    expanded, rest = [], list(args)
    while rest:
        name, mark, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            expanded.append(name + mark + value)
            continue
        words = [value] if mark else []
        while not mark and rest and not rest[0].startswith("--"):
            words.append(rest.pop(0))
        if name in (MEMORY_ONLY, MEMORY_ONLY.replace("-only", "_only")) and not words:
            words = ["true"]
        if name == LIST_OF_BASELINES and not (len(words) == 1 and words[0].startswith("[")):
            words = [json.dumps(words)]
        expanded += ["--" + name[2:].replace("-", "_"), *words]
    return expanded


def _grouped(args: list[str], command: str) -> list[str]:
    """Rewrite flat names into their places in groups."""
    places, expanded, rest = FLAT_NAMES[command], [], list(args)
    while rest:
        flag, mark, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            expanded.append(flag + mark + value)
            continue
        values = [value] if mark else []
        if not mark and rest and not rest[0].startswith("--"):
            values = [rest.pop(0)]
        name = flag[2:].rstrip("+")
        if name in SHORT_GROUPS and values and not _is_mapping(values[0]):
            flag = flag.replace(name, SHORT_GROUPS[name], 1)
        elif name in places:
            flag = flag.replace(name, places[name], 1)
        elif name == "config":
            values = [_grouped_config(value, command) for value in values]
        expanded += [flag + mark + values[0]] if mark else [flag, *values]
    return expanded


def _read_yaml(value: str) -> Node | None:
    """Read a file's name or YAML text; None: it is neither, and the parser says what is wrong."""
    try:
        return yaml.compose(Path(value).read_text(encoding="utf-8") if _is_file(value) else value)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # YAML text that is too long for a file's name
        return False


def _is_mapping(value: str) -> bool:
    """Whether a group is given as a whole, as YAML text or as a file."""
    return isinstance(_read_yaml(value), MappingNode)


def _grouped_config(value: str, command: str) -> str:
    """Return the YAML text of a config with its flat keys in groups, or `value` itself where there are none.

    Nodes are moved as they stand, so the parser reads every value by its own rules.

    Args:
        value: a file's name, or YAML text.
    """
    root = _read_yaml(value)
    if not isinstance(root, MappingNode):
        return value
    sections = [node for key, node in root.value if key.value == command and isinstance(node, MappingNode)]
    moved = [_move_flat_keys(section, command) for section in [root, *sections]]
    return yaml.serialize(root) if any(moved) else value


def _move_flat_keys(root: MappingNode, command: str) -> bool:
    """Move the flat keys of a mapping into their groups; whether there were any."""
    moves = [(key, node, _place(str(key.value), node, command)) for key, node in root.value]
    for key, node, place in moves:
        if place is not None:
            root.value.remove((key, node))
            _put(root, place, node, key.value)
    return any(place is not None for _, _, place in moves)


def _place(key: str, node: Node, command: str) -> str | None:
    """Return the place of a flat key in its group; None: the key stays where it is."""
    if key in SHORT_GROUPS:
        whole = isinstance(node, MappingNode) or (isinstance(node, ScalarNode) and _is_mapping(node.value))
        return None if whole else SHORT_GROUPS[key]
    return FLAT_NAMES[command].get(key)


def _put(root: MappingNode, place: str, node: Node, flat: str) -> None:
    """Add an option to its group, which is made where it is missing."""
    group, _, name = place.partition(".")
    options = next((value for key, value in root.value if key.value == group and isinstance(value, MappingNode)), None)
    if options is None:
        options = MappingNode("tag:yaml.org,2002:map", [])
        root.value.append((ScalarNode("tag:yaml.org,2002:str", group), options))
    if any(key.value == name for key, _ in options.value):
        raise SmartKVError(f"'{flat}' and '{place}' are two names of one option and both are given: leave one out")
    options.value.append((ScalarNode("tag:yaml.org,2002:str", name), node))
