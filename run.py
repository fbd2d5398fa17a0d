"""model.bin -> chat | generate | info | perplexity: `python run.py model.bin -m chat`, `--help` for the rest."""

import sys

from qwen3c.run import main

if __name__ == "__main__":
    sys.exit(main())
