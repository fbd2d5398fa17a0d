"""Text -> a model: `python train.py pretrain | sft | grpo`, or `--help`."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C while the modules load is an end without a traceback; later main() answers it
    answer = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qwen3c.cli.train import main

    signal.signal(signal.SIGINT, answer)
    sys.exit(main())
