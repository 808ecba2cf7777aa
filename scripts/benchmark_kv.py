"""The old benchmark of gates in a cache. The cache that obeys the gates is not built yet, and this says so."""

import sys

sys.exit(
    "benchmark_kv.py: the eviction cache is not part of SmartKV yet, so there is nothing to benchmark.\n"
    "What can be measured today: python -m eval gates (R² of the gates beside their nulls), python -m eval speed."
)
