"""Finds the files of gates in a folder, among the gates shipped with SmartKV, or on the hub."""

from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from smartkv.errors import SmartKVError
from smartkv.io.checks import check_number, check_type, check_whole, describe
from smartkv.io.hub import connection_error, hub_trouble, is_local

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PRETRAINED = Path(str(files("smartkv"))) / "pretrained"
EXAMPLE = "smollm2-135m-instruct"  # the gates that messages name


def pretrained_gates() -> list[str]:
    """List the names of the gates shipped with SmartKV.

    Each is named after its model and can be given to `GateBank.from_pretrained`.
    """
    return sorted(folder.parent.name for folder in PRETRAINED.glob(f"*/{CONFIG}"))


def find_file(folder_or_id: str | Path, name: str, revision: str | None) -> Path:
    """Find one file of exported gates.

    Args:
        folder_or_id: A local folder, a name from `pretrained_gates()`, or a hub id. They are tried in this order.
        name: Name of the file.
        revision: Revision of the hub repository.

    Returns:
        Its local path. A file of the hub is downloaded first.

    Raises:
        SmartKVError: This is no name, the file does not exist, or the hub cannot be reached.
    """
    if not isinstance(folder_or_id, str | Path) or not str(folder_or_id):
        raise SmartKVError(f"expected {_EXPECTED}, got {describe(folder_or_id)}: for example '{EXAMPLE}'")
    folder = Path(folder_or_id).expanduser()
    if not folder.is_dir() and str(folder_or_id) in pretrained_gates():
        folder = PRETRAINED / str(folder_or_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise SmartKVError(f"{folder / name} is missing: '{folder_or_id}' is not a folder of exported gates")
        return folder / name
    if folder.is_file():
        raise SmartKVError(f"'{folder_or_id}' is a file: give the folder of exported gates, '{folder.parent}'")
    if is_local(folder_or_id) or "/" not in str(folder_or_id):  # gates on the hub are always "owner/name"
        raise _missing(folder_or_id, "")
    trouble = hub_trouble()
    try:
        return Path(hf_hub_download(str(folder_or_id), name, revision=revision, local_files_only=trouble is not None))
    except LocalEntryNotFoundError as error:  # a subclass of several others
        raise _missing(folder_or_id, trouble or "the hub does not answer") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise _missing(folder_or_id, f"it has no such repository, or none with a {name}") from error
    except (HfHubHTTPError, OSError, connection_error()) as error:
        raise _missing(folder_or_id, (str(error).strip() or type(error).__name__).splitlines()[0]) from error


_EXPECTED = "a folder of exported gates, a hub id, or the name of gates shipped with SmartKV"


def _missing(name: str | Path, reason: str) -> SmartKVError:
    """Return the error for gates that are nowhere; `reason` is why the hub does not have them."""
    near = [] if isinstance(name, Path) else get_close_matches(name.lower(), pretrained_gates(), 1, 0.7)
    return SmartKVError(
        f"gates '{name}' are neither a local folder nor available from the hub{f' ({reason})' if reason else ''}: "
        + (f"did you mean '{near[0]}'? Else " if near else "")
        + f"give {_EXPECTED}: {', '.join(pretrained_gates())}"
    )


def check_details(content: Any) -> dict[str, Any]:
    """Check the `details` of a gates' `config.json`.

    Returns:
        The details, unchanged.

    Raises:
        ValueError: A known entry has the wrong type or an impossible value.
    """
    details: dict[str, Any] = check_type("details", content, dict)
    ages = [check_whole("ages", age, 1) for age in check_type("ages", details.get("ages", []), list)]
    if ages != sorted(set(ages)):
        raise ValueError(f"ages must be ascending, got {ages}")
    for point in check_type("prices", details.get("prices", []), list):
        if len(check_type("prices", point, list)) != 2 or not 0 < check_number("footprint", point[0]) <= 1:
            raise ValueError(f"prices must be pairs of a footprint in (0, 1] and a price, got {point!r}")
        check_number("price", point[1])
    for point in check_type("layer_shares", details.get("layer_shares", []), list):
        if len(check_type("layer_shares", point, list)) != 2 or not isinstance(point[1], list):
            raise ValueError(f"layer_shares must be pairs of a footprint and a list of shares, got {point!r}")
        for value in (point[0], *point[1]):
            check_number("layer_shares", value)
    check_whole("sinks", details.get("sinks", 0))
    for name in ("target", "inputs"):
        check_type(name, details.get(name, ""), str)
    for name in ("objective", "report"):
        check_type(name, details.get(name, {}), dict)
    return details
