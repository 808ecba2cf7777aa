"""Entry point of the GPU check: `python -m eval.gpu --help`."""

import sys

from eval.gpu.check import main

if __name__ == "__main__":
    sys.exit(main())
