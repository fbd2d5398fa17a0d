"""model.bin -> chat | generate | info | perplexity: `python run.py model.bin -m chat`, or `--help`."""

import sys

from qwen3c.cli.start import run

if __name__ == "__main__":
    sys.exit(run())
