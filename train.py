"""Text -> a model: `python train.py pretrain | sft | grpo`, or `--help`."""

import sys

from qwen3c.cli.start import train

if __name__ == "__main__":
    sys.exit(train())
