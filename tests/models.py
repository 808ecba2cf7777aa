"""Tiny random models, a byte-level tokenizer and tiny shards, for every test of the project."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from smartkv.gates.bank import GateBank
from smartkv.labels.lifespans import LabelSpec
from smartkv.models.architecture import Fingerprint
from smartkv.models.backbone import load_backbone
from smartkv.shards.manifest import Manifest, ShardEntry, shard_entry, shard_header
from smartkv.shards.shard_file import write_shard

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # wide enough that attention is uneven
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2_SHAPE = {key: SHAPE[key] for key in SHAPE if key not in ("intermediate_size", "num_key_value_heads")}


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A random float32 model in evaluation mode; biases and norm weights are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # transformers starts them at 0 or 1, which would hide a bias or norm left out
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def llama(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Llama: no bias, two query heads a KV head."""
    return build(LlamaConfig(**SHAPE | changes), seed)


def qwen2(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Qwen2: a bias in `k_proj`."""
    return build(Qwen2Config(**SHAPE | changes), seed)


def qwen3(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Qwen3: `k_norm`, and heads that are not hidden / heads wide."""
    return build(Qwen3Config(**SHAPE | {"head_dim": 12} | changes), seed)


def mistral(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Mistral with full attention."""
    return build(MistralConfig(**SHAPE | {"sliding_window": None} | changes), seed)


def mistral_sliding(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Mistral whose queries see 8 keys."""
    return mistral(seed, **{"sliding_window": 8} | changes)


def qwen2_mixed(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Qwen2 whose first layer sees 8 keys, and whose second sees everything."""
    kinds = ["sliding_attention", "full_attention"]
    own = {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds, "num_hidden_layers": 2}
    return qwen2(seed, **own | changes)


def gpt2(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """GPT-2: fused projection, no rotary embedding, as many KV heads as query heads."""
    return build(GPT2Config(**GPT2_SHAPE | changes), seed)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "mistral_sliding": mistral_sliding,
    "gpt2": gpt2,
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes 0-255 as tokens and an end-of-text token: 257 ids, any text, no file and no network."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def save_tiny_backbone(
    folder: Path | str, family: str = "llama", max_positions: int = 256, seed: int = 0, **changes: Any
) -> Path:
    """A local folder that `load_backbone` takes: a tiny random model and a tokenizer for any text."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    sizes = {"vocab_size": 264, "max_position_embeddings": max_positions, "bos_token_id": end, "eos_token_id": end}
    FAMILIES[family](seed, **sizes | changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def token_ids(length: int, seed: int = 0, vocabulary: int = 64) -> torch.Tensor:
    """Random ids, `[length]`."""
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


def shard_tensors(
    layers: int = 2,
    kv_heads: int = 2,
    head_dim: int = 4,
    windows: int = 2,
    window: int = 16,
    thresholds: int = 1,
    ages: int = 0,
    post_rope: bool = False,
    vocabulary: int = 10,
    split: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Random tensors that keep a shard's contract: dtypes, shapes, lifespans that fit into the window."""
    generator = torch.Generator().manual_seed(seed)
    tokens = windows * window
    position = torch.arange(window, dtype=torch.int32).repeat(windows)
    shape = (layers, kv_heads, tokens)
    room = (window - position).expand(thresholds, *shape)
    share = torch.rand(thresholds, *shape, generator=generator)
    tensors = {
        "keys": torch.randn(*shape, head_dim, generator=generator).half(),
        "lifespan": (1 + share * (room - 1)).round().int(),
        "horizon": window - 1 - position,
        "position": position,
        "token": torch.randint(vocabulary, (tokens,), generator=generator).int(),
        "document": torch.arange(windows, dtype=torch.int32).repeat_interleave(window),
        "split": torch.full((tokens,), split, dtype=torch.int32),
    }
    if post_rope:
        tensors["keys_post_rope"] = torch.randn(*shape, head_dim, generator=generator).half()
    if ages:
        tensors["future_attention"] = torch.rand(ages, *shape, generator=generator)
    return tensors


def write_tiny_shards(
    folder: Path,
    splits: Sequence[tuple[str, int]] = (("train", 2), ("train", 1), ("validation", 3)),
    thresholds: tuple[float, ...] = (0.05, 0.1),
    ages: tuple[int, ...] = (),
    follow_up: int = 4,
    window: int = 16,
    sinks: int = 2,
    **sizes: Any,
) -> Manifest:
    """A folder of shards with its manifest, read back. `splits`: (split, windows) of each shard."""
    entries: list[ShardEntry] = []
    spec = LabelSpec(thresholds, ages, follow_up)
    for number, (split, windows) in enumerate(splits):
        tensors = shard_tensors(
            windows=windows,
            window=window,
            thresholds=len(thresholds),
            ages=len(ages),
            split=("train", "validation", "test").index(split),
            seed=number,
            **sizes,
        )
        path = folder / f"{split}-{number:03d}.safetensors"
        layers, kv_heads, _, head_dim = tensors["keys"].shape
        fingerprint = Fingerprint("llama", layers, kv_heads, head_dim, "0123456789abcdef")
        write_shard(path, tensors, shard_header(fingerprint, spec, window, sinks) | {"number": number})
        entries.append(shard_entry(path, split, windows, windows * window))
    Manifest(folder, fingerprint, spec, window, sinks, [], ["a", "b"], {"model": "tiny"}, entries).write()
    return Manifest.read(folder)


def save_random_gates(backbone: Path, out: Path, seed: int = 0) -> Path:
    """Untrained gates for every head of `backbone`."""
    torch.manual_seed(seed)
    GateBank(load_backbone(str(backbone), "float32").fingerprint).save_pretrained(out)
    return out
