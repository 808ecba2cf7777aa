"""The old name of `python -m eval baselines --memory-only`: no model is loaded."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts run from anywhere; the commands live in the checkout

from eval.__main__ import main

if __name__ == "__main__":
    main(["baselines", "--memory-only", *sys.argv[1:]])
