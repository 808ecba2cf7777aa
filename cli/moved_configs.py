"""Configs of version 0.1 that have moved, and the options that name their successors."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from smartkv.errors import SmartKVError

_TUNING, _LIFESPANS, _DISTILLED = "eviction_tuning/base.yaml", "gates/smollm2.yaml", "gates/distilled.yaml"
MOVED_CONFIGS = {  # files of version 0.1 below configs/ -> the base and the overlay that replace them
    "eit/smollm2.yaml": (_TUNING,),
    "eit/smollm2-plain.yaml": (_TUNING, "eviction_tuning/plain.yaml"),
    "eit/smollm2-random.yaml": (_TUNING, "eviction_tuning/random.yaml"),
    "eit/smollm2-window.yaml": (_TUNING, "eviction_tuning/window.yaml"),
    "eit/smollm2-gates.yaml": (_TUNING, "eviction_tuning/gates.yaml"),
    "eit/qwen2.5-0.5b.yaml": (_TUNING, "eviction_tuning/qwen2.5-0.5b.yaml"),
    "eit/qwen3-8b.yaml": (_TUNING, "eviction_tuning/qwen3-8b.yaml"),
    "eit/llama-3.1-8b.yaml": (_TUNING, "eviction_tuning/llama-3.1-8b.yaml"),
    "gates/books.yaml": (_LIFESPANS, "gates/lifespans/books.yaml"),
    "gates/books-post-rope.yaml": (_LIFESPANS, "gates/lifespans/books-post-rope.yaml"),
    "gates/qwen2.5-0.5b.yaml": (_LIFESPANS, "gates/lifespans/qwen2.5-0.5b.yaml"),
    "gates/qwen3-0.6b.yaml": (_LIFESPANS, "gates/lifespans/qwen3-0.6b.yaml"),
    "gates/lists.yaml": (_DISTILLED, "gates/distilled/lists.yaml"),
    "gates/qwen2.5-0.5b-distilled.yaml": (_DISTILLED, "gates/distilled/qwen2.5-0.5b.yaml"),
    "gates/qwen3-0.6b-distilled.yaml": (_DISTILLED, "gates/distilled/qwen3-0.6b.yaml"),
}


def refuse_moved_configs(args: Sequence[str]) -> None:
    """Raise SmartKVError with the new `-c` options if a config of version 0.1 is given that has moved."""
    for option, value in pairwise(["", *args]):
        path = value.partition("=")[2] if value.startswith(("--config=", "-c=")) else value
        if path == value and option not in ("-c", "--config"):
            continue
        folder, slash, name = Path(path).as_posix().rpartition("configs/")
        if slash and name in MOVED_CONFIGS and not Path(path).exists():
            options = " ".join(f"-c {folder}configs/{new}" for new in MOVED_CONFIGS[name])
            raise SmartKVError(f"{path} has moved: give {options} instead")
