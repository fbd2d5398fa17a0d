"""model.bin -> chat | generate | trace | info | perplexity | bench | batch.

    python run.py model.bin -m chat
    python run.py model.bin -i "Why is the sky blue?"
    python run.py model.bin -m generate -i "def fibonacci(n):" -n 64

In order: arguments, the model, one line on stderr that says what was chosen, then one of the modes. stdout
gets the model's text, or the result of info, perplexity and bench.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .command import answer
from .options import COMPUTING, SCRIPT, SMALLER_CONTEXT, parse


def main(argv: Sequence[str] | None = None) -> int:
    """The command run.py or qwen3c; its exit status, as cli/command.py lists them."""
    return answer(argv, script=SCRIPT, parse=parse, work=_work, cure=SMALLER_CONTEXT)


def _work(args: argparse.Namespace) -> int:
    if args.mode in COMPUTING:
        from ..memory import check_space_for_program

        check_space_for_program()
    if args.mode != "models" and args.url is None:
        from .named import model_file

        args.model = model_file(args.model, args.bits)
        args.draft = args.draft and model_file(args.draft)
    from .modes import MODES

    return MODES[args.mode](args)


if __name__ == "__main__":
    sys.exit(main())
