"""Old path of `smartkv.gates.objectives`, kept because configs and checkpoints of version 0.1 name it."""

from smartkv.gates.objectives import FutureAttention, Log4Lifespan, Objective, OrdinalAges, Ranking

__all__ = ["FutureAttention", "Log4Lifespan", "Objective", "OrdinalAges", "Ranking"]
