"""Hugging Face directory -> model.bin: `python export.py path/to/Qwen3-0.6B model.bin`."""

import sys

from qwen3c.cli.start import export

if __name__ == "__main__":
    sys.exit(export())
