"""What decides without training which keys stay, to be measured beside gates. Simulated in one forward pass: nothing is
freed, and what has gone is not seen."""

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
from smartkv.baselines.simulation import Simulation, compressed

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
    "compressed",
]
