"""Shards: harvested keys and labels in files or in memory. Knows no gate and no text."""

from smartkv.shards.manifest import Manifest
from smartkv.shards.reader import ShardReader

__all__ = ["Manifest", "ShardReader"]
