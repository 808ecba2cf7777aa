"""Modules of version 0.1 that have moved: whoever imports one is told its new name."""

import sys
from collections.abc import Sequence
from types import ModuleType

MOVED = {  # below `smartkv`: the module of version 0.1 -> where its content is now
    "attached": ("cache.attached",),
    "attention": ("models.observation",),
    "auto": ("policy_search",),
    "backbones": ("models.backbone", "models.architecture"),
    "baselines.live": ("baselines.state",),
    "baselines.rotation": ("models.rotary",),
    "blocks": ("cache.paged", "cache.ragged"),
    "cache_files": ("cache.serialization",),
    "calibration": ("labels.attention_distribution",),
    "checked": ("io.checks",),
    "chunks": ("cache.chunk_attention",),
    "codecs": ("quantization.codecs",),
    "feeding": ("cache.model_patch",),
    "files": ("io.atomic",),
    "folders": ("io.locks",),
    "gate_files": ("gates.pretrained", "gates.model_card"),
    "head_files": ("shards.per_head_export",),
    "held": ("shards.in_memory",),
    "holdings": ("cache.usage",),
    "hub": ("io.hub",),
    "lifespans": ("labels.lifespans",),
    "moments": ("gates.standardization",),
    "nulls": ("metrics.nulls",),
    "oracles": ("baselines.oracles",),
    "packed_rows": ("quantization.per_token",),
    "perplexity": ("metrics.perplexity",),
    "rankings": ("metrics.ranking",),
    "rows": ("shards.labelled_keys",),
    "scores": ("metrics.r2", "metrics.bootstrap"),
    "shard_files": ("shards.shard_file",),
    "soft_eviction": ("distillation.soft_attention",),
    "storage": ("cache.layer",),
}


def moved_line(name: str) -> str | None:
    """Return the line that tells where a module of version 0.1 is now; None: it was none, or has not moved.

    Args:
        name: of the module, below `smartkv`.
    """
    if name not in MOVED:
        return None
    return f"smartkv.{name} is now {' and '.join(f'smartkv.{new}' for new in MOVED[name])}: see CHANGELOG.md, Renamed"


class MovedModules:
    """Finder of modules that finds none, and whose error for one that has moved is its new name."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Raise ModuleNotFoundError for a module that has moved; any other is left to other finders."""
        line = moved_line(name.removeprefix("smartkv.")) if name.startswith("smartkv.") else None
        if line is not None:
            raise ModuleNotFoundError(line)  # without its `name`, for which `from smartkv import …` has another message


def tell_moved_modules() -> None:
    """Add the finder to Python's, behind all others."""
    if MovedModules not in sys.meta_path:
        sys.meta_path.append(MovedModules)
