"""Lightning callbacks. Importing the package lets configs name these classes without their module."""

from callbacks.adapter_export import AdapterExport
from callbacks.fit_progress import FitProgress
from callbacks.gate_export import GateExport
from callbacks.harvest_progress import HarvestProgress
from callbacks.head_dashboard import HeadDashboard
from callbacks.hybrid_cache_perplexity import HybridCachePerplexity
from callbacks.run_config import RunConfig
from callbacks.shard_writer import ShardWriter

__all__ = [
    "AdapterExport",
    "FitProgress",
    "GateExport",
    "HarvestProgress",
    "HeadDashboard",
    "HybridCachePerplexity",
    "RunConfig",
    "ShardWriter",
]
