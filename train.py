"""Text -> a model: `python train.py pretrain | sft | grpo`, or `--help`."""

import sys

from qwen3c.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
