"""Shards of harvested keys and labels, in files or in memory; no gates and no texts."""

from smartkv.shards.manifest import Manifest
from smartkv.shards.reader import ShardReader

__all__ = ["Manifest", "ShardReader"]
