"""Metadata of the single shard of the tests."""

METADATA = {"b": 1, "a": [2, "é"], "c": {"y": 0, "x": None}}
