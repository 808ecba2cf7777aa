"""The files in configs/ as the tests read them: each with the base that it is given after."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.lightning_fixtures import ROOT

FOLDER = ROOT / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
OBJECTIVES = sorted((FOLDER / "gates/objectives").glob("*.yaml"))


def name_of(path: Path) -> str:
    """The path below configs/ without its ending, such as `gates/smollm2`."""
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def files_of(path: Path) -> list[Path]:
    """The files that run a config: itself, or for an overlay those of the command in its first line."""
    given = re.findall(r"-c (\S+)", path.read_text().partition("\n")[0])
    return [ROOT / file for file in given] if len(given) > 1 else [path]


def options_of(path: Path) -> list[str]:
    """The `-c` options of main.py that run a config."""
    return [option for file in files_of(path) for option in ("-c", str(file))]


def merged(path: Path) -> dict[str, Any]:
    """A config on top of its base."""
    config: dict[str, Any] = {}
    for file in files_of(path):
        config = _on_top(config, load(file))
    return config


def _on_top(base: Any, overlay: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(overlay, dict):
        return overlay
    if overlay.get("class_path", base.get("class_path")) != base.get("class_path"):
        return overlay  # another class takes none of the settings of the first
    return base | {key: _on_top(base.get(key), value) for key, value in overlay.items()}


def settings(config: Any) -> Iterator[tuple[str, Any]]:
    """All (name, value) of a config at any depth."""
    if isinstance(config, dict):
        for name, value in config.items():
            yield name, value
            yield from settings(value)
    elif isinstance(config, list):
        for value in config:
            yield from settings(value)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key, without `init_args`; a class is the value of its own key, an item is named by its class."""
    if isinstance(config, list) and all(isinstance(item, dict) and "class_path" in item for item in config):
        config = {item["class_path"]: item for item in config}
    if not isinstance(config, dict):
        return {prefix: config}
    values: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix if key in ("class_path", "init_args") else f"{prefix}.{key}".lstrip(".")
        values |= flat(value, name)
    return values
