"""The old path of `smartkv.gates.objectives`, which configs and checkpoints of version 0.1 name."""

from smartkv.gates.objectives import FutureAttention, Log4Lifespan, Objective, OrdinalAges, Ranking

__all__ = ["FutureAttention", "Log4Lifespan", "Objective", "OrdinalAges", "Ranking"]
