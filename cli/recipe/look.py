"""Looks at a model and the texts before anything is made: can it be done here, and what does a piece of it take?"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from cli.recipe.mix import Part, default_mix, own_mix
from cli.recipe.settings import SIZES, Amounts, Options
from cli.recipe.timing import time_backbone
from eval.common.isolated import run_isolated
from smartkv.errors import SmartKVError
from smartkv.models.architecture import Architecture
from smartkv.models.backbone import (
    check_device,
    count_parameters,
    load_tokenizer,
    read_architecture,
    resolve_dtype,
)
from smartkv.texts.sources import SourceConfig
from smartkv.texts.windows import NoWindows, plan_windows

Say = Callable[[str], None]


@dataclass(frozen=True)
class Kind:
    """A kind of text that the report measures.

    Attributes:
        name: of the kind.
        split: whose documents are read: test, or validation where there are none for a test.
        sources: as in a config.
    """

    name: str
    split: str
    sources: list[dict[str, Any]]


@dataclass(frozen=True)
class Look:
    """What was seen of a model and its texts on this machine.

    Attributes:
        model_type, layers, kv_heads, head_dim, max_positions: as in `Architecture`.
        gated_layers: layers whose keys gates judge.
        parameters: of the model.
        scored_tokens: queries of a window that the distillation compares with the full cache.
        device, threads: where the steps compute, and with how many CPU threads.
        parts: the mix of texts.
        kinds: what the report measures.
        seconds: see `cli.recipe.timing.time_work`.
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    max_positions: int
    gated_layers: int
    parameters: int
    scored_tokens: int
    device: str
    threads: int
    parts: list[Part]
    kinds: list[Kind]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the look as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Look":
        """Return the look that `to_dict` gave."""
        parts, kinds = [Part(**part) for part in content["parts"]], [Kind(**kind) for kind in content["kinds"]]
        return cls(**content | {"parts": parts, "kinds": kinds})


def look(options: Options, say: Say) -> Look:
    """Look at the model and the texts, and time a piece of each step.

    Args:
        options: what the user chose.
        say: called with a line for the user.

    Raises:
        SmartKVError: the model is not supported, does not fit into the memory, or a text that it needs is missing.
    """
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    trust = options.trust_remote_code
    architecture = read_architecture(options.backbone, trust)
    amounts = SIZES[options.size].within(architecture.max_positions)
    parameters = count_parameters(options.backbone, trust)
    dtype = resolve_dtype(options.dtype, device)
    _check_memory(options.backbone, parameters * dtype.itemsize, dtype, device)
    say(_describe(options, architecture, parameters, dtype, device))
    parts = _default(amounts, say) if options.sources is None else own_mix(options.sources)
    tokenizer = load_tokenizer(options.backbone, trust)
    kinds = _kinds(parts, tokenizer, amounts, say)
    say("timing a piece of each step …")
    # in a process of its own: its memory is free again when the steps begin
    seen = run_isolated(time_backbone, options.backbone, options.dtype, device, trust, amounts)
    if "note" in seen:
        raise SmartKVError(f"there is not enough memory for '{options.backbone}' here ({seen['note']})")
    say(f"the key before the rotary embedding: output of {seen['site']}, checked on the model")
    peak = seen["gpu_bytes"] or seen["peak_memory"]
    say(f"largest memory of these pieces: {peak / 1e9:.1f} GB of {_memory(device)[1] / 1e9:.1f} GB")
    return Look(
        model_type=architecture.model_type,
        layers=architecture.layers,
        kv_heads=architecture.kv_heads,
        head_dim=architecture.head_dim,
        max_positions=architecture.max_positions,
        gated_layers=len(architecture.gated_layers),
        parameters=parameters,
        scored_tokens=seen["scored_tokens"],
        device=device,
        threads=torch.get_num_threads(),
        parts=parts,
        kinds=kinds,
        seconds=seen["seconds"],
    )


def _describe(options: Options, architecture: Architecture, parameters: int, dtype: torch.dtype, device: str) -> str:
    sliding = architecture.layers - len(architecture.gated_layers)
    rest = f" ({sliding} layers slide and need none)" if sliding else ""
    return (
        f"{options.backbone} ({architecture.model_type}): {parameters / 1e6:,.1f} million parameters in "
        f"{str(dtype).removeprefix('torch.')} on {device}; {architecture.layers} layers, "
        f"{architecture.kv_heads} KV heads of {architecture.head_dim} dims: {architecture.gates} gates{rest}"
    )


def _memory(device: str) -> tuple[int, int]:
    """Return the free and the whole memory of a device, bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _check_memory(backbone: str, needed: int, dtype: torch.dtype, device: str) -> None:
    free, _ = _memory(device)
    if needed > free:
        raise SmartKVError(
            f"the weights of '{backbone}' take {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, and "
            f"{device} has {free / 1e9:.1f} GB of memory free: free some, or take a smaller dtype, another device or a "
            "smaller model"
        )


def _default(amounts: Amounts, say: Say) -> list[Part]:
    """Return the default mix, without facts where windows are too short for them."""
    parts = default_mix(say)
    if amounts.facts:
        return parts
    for part in parts:
        if not part.measured:
            share = f"{part.weight:.0%} of the mix"
            say(f"left out: {part.name} ({share}): {amounts.window} positions have no room for facts")
    return [part for part in parts if part.measured]


def _kinds(parts: list[Part], tokenizer: Any, amounts: Amounts, say: Say) -> list[Kind]:
    """Return the kinds of text that the report measures, after a look whether there is text for each split.

    Raises:
        SmartKVError: a text cannot be read, a part has no training text, or no part has validation text.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    validates = False
    for part in parts:
        has = {split: _why_none(part, split, tokenizer, amounts) for split in ("train", "validation", "test")}
        if has["train"]:
            raise SmartKVError(f"source '{part.name}' cannot be learned from: {has['train']}")
        validates |= has["validation"] is None
        if not part.measured:
            continue
        split = next((split for split in ("test", "validation") if has[split] is None), None)
        if split is None:
            say(f"the report leaves out {part.name}: {has['test']}")
            continue
        if split == "validation":
            say(f"the report reads validation texts of {part.name}: {has['test']}")
        found.setdefault(part.kind, {}).setdefault(split, []).append(part.source)
    if not validates:
        raise SmartKVError("no source has a validation window: give more text, or a subfolder 'validation'")
    kinds = []
    for kind, splits in found.items():
        split, sources = next(iter(splits.items()))
        kinds.append(Kind(kind, split, sources))
    return kinds


def _why_none(part: Part, split: str, tokenizer: Any, amounts: Amounts) -> str | None:
    """Return why a source has no window of a split; None: it has.

    Raises:
        SmartKVError: its text cannot be read.
    """
    try:
        plan_windows([SourceConfig(**part.source)], {split: 1}, tokenizer, amounts.window, say=lambda line: None)
    except NoWindows as error:
        return str(error)
    return None
