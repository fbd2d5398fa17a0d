"""Text -> a model: `python train.py pretrain | sft | grpo`, or `--help`."""

import sys

from qwen3c.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
