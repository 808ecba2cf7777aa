"""Baselines: published eviction methods and oracles, simulated in one forward pass; no memory is freed."""

from smartkv.baselines.methods import (
    H2O,
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Method,
    Random,
    SnapKV,
    StreamingLLM,
)
from smartkv.baselines.schedules import Once, Schedule, Streaming
from smartkv.baselines.simulation import Simulation, simulated_eviction

__all__ = [
    "H2O",
    "TOVA",
    "ExpectedAttention",
    "KeyDiff",
    "KeyNorm",
    "Method",
    "Once",
    "Random",
    "Schedule",
    "Simulation",
    "SnapKV",
    "Streaming",
    "StreamingLLM",
    "simulated_eviction",
]
