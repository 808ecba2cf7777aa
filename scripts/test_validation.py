"""Old name of `python -m eval baselines --memory-only`, which loads no model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that the script runs from any folder

from eval.__main__ import main

if __name__ == "__main__":
    main(["baselines", "--memory-only", *sys.argv[1:]])
