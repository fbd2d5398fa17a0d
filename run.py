"""model.bin -> chat | generate | info | perplexity: `python run.py model.bin -m chat`, or `--help`."""

import sys

from qwen3c.cli.run import main

if __name__ == "__main__":
    sys.exit(main())
