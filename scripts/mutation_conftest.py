"""The conftest.py of a mutation run: the tests that are likeliest and quickest to notice a mutant come first."""

import json
import os
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import Phase, settings

# the same examples for each mutant, and a failure is not looked into: shrinking it takes a minute
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)
settings.load_profile("mutation")

STATS = Path("mutmut-stats.json")  # of mutmut's first run of all tests
SECONDS = float(os.environ.get("MUTATION_SECONDS", 10))  # of other modules' tests that judge a mutant


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the tests of the mutant's module first, then the quickest others, as many as `SECONDS` allow."""
    module = os.environ.get("MUTANT_UNDER_TEST", "").rpartition(".")[0]
    folder, _, name = module.replace(".", "/").rpartition("/")
    own = f"tests/{folder}/test_{name}.py::"
    took = json.loads(STATS.read_text())["duration_by_test"] if STATS.exists() else {}
    items.sort(key=lambda item: (not item.nodeid.startswith(own), took.get(item.nodeid, 0)))
    if folder:  # else mutmut's first run, or its check that the tests pass
        others = accumulate(took.get(item.nodeid, 0) for item in items if not item.nodeid.startswith(own))
        number = sum(item.nodeid.startswith(own) for item in items) + sum(total <= SECONDS for total in others)
        del items[number:]
