"""Where gates lie: in a folder, among those that come with SmartKV, or on the hub; and their model card."""

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
    """Names of the gates that come with SmartKV, after the models they belong to; for `GateBank.from_pretrained`."""
    return sorted(folder.parent.name for folder in PRETRAINED.glob(f"*/{CONFIG}"))


def find(folder_or_id: str | Path, name: str, revision: str | None) -> Path:
    """A file of gates.

    Args:
        folder_or_id: a local folder; else one of `pretrained_gates()`; else a hub id.
        name: of the file.
        revision: of the hub repository.

    Raises:
        SmartKVError: it is not there.
    """
    folder = Path(folder_or_id).expanduser()
    if not folder.is_dir() and str(folder_or_id) in pretrained_gates():
        folder = PRETRAINED / str(folder_or_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            raise SmartKVError(f"{folder / name} is missing: '{folder_or_id}' is not a folder of gates")
        return folder / name
    try:
        return Path(hf_hub_download(str(folder_or_id), name, revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, connection_error()) as error:
        raise SmartKVError(
            f"gates '{folder_or_id}' are neither a local folder nor to be had from the hub; "
            f"with SmartKV come: {', '.join(pretrained_gates())}"
        ) from error


def checked_details(content: Any) -> dict[str, Any]:
    """What gates remember beside their shape, a ValueError where anything that is read is not what it should be."""
    details: dict[str, Any] = check_type("details", content, dict)
    ages = [check_whole("ages", age, 1) for age in check_type("ages", details.get("ages", []), list)]
    if ages != sorted(set(ages)):
        raise ValueError(f"ages must rise, got {ages}")
    for point in check_type("prices", details.get("prices", []), list):
        if len(check_type("prices", point, list)) != 2 or not 0 < check_number("footprint", point[0]) <= 1:
            raise ValueError(f"prices are pairs of a footprint and a price, got {point!r}")
        check_number("price", point[1])
    check_whole("sinks", details.get("sinks", 0))
    for name in ("target", "inputs"):
        check_type(name, details.get(name, ""), str)
    check_type("objective", details.get("objective", {}), dict)
    return details
