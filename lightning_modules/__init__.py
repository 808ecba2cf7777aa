"""LightningModules. Importing the package lets configs name these classes without their module."""

from lightning_modules.distillation import DistilledGates
from lightning_modules.eviction_tuning import EvictionTuning
from lightning_modules.gates import LifespanGates
from lightning_modules.harvest import Harvest

__all__ = ["DistilledGates", "EvictionTuning", "Harvest", "LifespanGates"]
