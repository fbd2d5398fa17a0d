"""Hugging Face directory -> model.bin: `python export.py path/to/Qwen3-0.6B model.bin`."""

import signal
import sys

if __name__ == "__main__":
    # Ctrl-C while the modules load is an end without a traceback; later main() answers it
    answer = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qwen3c.cli.export import main

    signal.signal(signal.SIGINT, answer)
    sys.exit(main())
