"""Hugging Face directory -> model.bin: `python export.py path/to/Qwen3-0.6B model.bin`."""

import sys

from qwen3c.cli.export import main

if __name__ == "__main__":
    sys.exit(main())
