"""`python -m qwen3c`: the command line of run.py."""

import sys

from .cli.start import run

if __name__ == "__main__":
    sys.exit(run())
