"""model.bin -> chat | generate | info | perplexity: `python run.py model.bin -m chat`, or `--help`."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C while the modules load is an end without a traceback; later main() answers it
    answer = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qwen3c.cli.run import main

    signal.signal(signal.SIGINT, answer)
    sys.exit(main())
