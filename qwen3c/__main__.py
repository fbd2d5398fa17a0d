"""`python -m qwen3c`: the command line of run.py."""

import sys

from .cli.run import main

if __name__ == "__main__":
    sys.exit(main())
