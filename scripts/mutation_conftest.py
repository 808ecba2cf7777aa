"""The conftest.py of a mutation run: the tests that are likeliest and quickest to notice a mutant come first."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# the same examples for each mutant, and a failure is not looked into: shrinking it takes a minute
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)
settings.load_profile("mutation")

STATS = Path("mutmut-stats.json")  # of mutmut's first run of all tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the tests: those of the mutant's module first, then the quickest."""
    module = os.environ.get("MUTANT_UNDER_TEST", "").rpartition(".")[0]
    own = f"tests/{module.replace('.', '/')}".rpartition("/")
    took = json.loads(STATS.read_text())["duration_by_test"] if STATS.exists() else {}
    items.sort(key=lambda item: (not item.nodeid.startswith(f"{own[0]}/test_{own[2]}.py"), took.get(item.nodeid, 0)))
