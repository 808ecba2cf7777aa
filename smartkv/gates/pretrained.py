"""Finds the files of gates in a folder, among the gates shipped with SmartKV, or on the hub."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from smartkv.errors import SmartKVError
from smartkv.io.checks import check_number, check_type, check_whole
from smartkv.io.hub import connection_error

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
PRETRAINED = Path(str(files("smartkv"))) / "pretrained"


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
        SmartKVError: The file does not exist, or the hub cannot be reached.
    """
    folder = Path(folder_or_id).expanduser()
    if not folder.is_dir() and str(folder_or_id) in pretrained_gates():
        folder = PRETRAINED / str(folder_or_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise SmartKVError(f"{folder / name} is missing: '{folder_or_id}' is not a folder of exported gates")
        return folder / name
    try:
        return Path(hf_hub_download(str(folder_or_id), name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, connection_error()) as error:
        raise SmartKVError(
            f"gates '{folder_or_id}' are neither a local folder nor available from the hub: give a folder of exported "
            f"gates, a hub id, or the name of gates shipped with SmartKV: {', '.join(pretrained_gates())}"
        ) from error


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
    check_whole("sinks", details.get("sinks", 0))
    for name in ("target", "inputs"):
        check_type(name, details.get(name, ""), str)
    check_type("objective", details.get("objective", {}), dict)
    return details
