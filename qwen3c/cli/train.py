"""The command train.py: text -> a model, by `pretrain`, `sft` or `grpo`.

python train.py pretrain texts/ -o base
python train.py sft chat.jsonl --model base -o tuned
python train.py grpo tasks.jsonl --model tuned --reward rewards:exact -o final
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..system.terminal import unheard
from ..training.telling import Telling
from .command import answer, program_name
from .signals import leaving_at_once
from .train_options import SCRIPT, parse

LIBRARIES = ("torch", "transformers", "accelerate", "matplotlib")
NEEDED = "needs the extra `train`: pip install torch==2.13.0, then pip install -e '.[train]'"
SMALLER_BATCH = "a smaller --micro-batch or --context takes less"  # said when memory runs out


def main(argv: Sequence[str] | None = None) -> int:
    """The command train.py; its exit status, as cli/command.py lists them, and 2 if the loss diverges."""
    return answer(
        argv, script=SCRIPT, parse=parse, work=_work, ended=lambda args, word: word, cure=SMALLER_BATCH
    )


def _work(args: argparse.Namespace) -> int:
    telling = Telling(args.quiet)
    with telling.doing("loading PyTorch"), leaving_at_once(program_name(SCRIPT)):
        _load_libraries()
    from ..training.trainer import Stopped
    from .stages import STAGES

    try:
        with _memory_of_torch():
            STAGES[args.stage](args, telling)
    except Stopped as stopped:
        with unheard():
            print(f"{program_name(SCRIPT)}: {stopped}", file=sys.stderr, flush=True)
        return 128 + stopped.signal
    return 0


def _load_libraries() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local directories
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"training {NEEDED} ({', '.join(missing)} missing)")
    # these take seconds to import: do it here, where a status line says so
    from accelerate import Accelerator  # noqa: F401
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3ForCausalLM  # noqa: F401
    from transformers.utils import logging

    silence: Any = logging.disable_progress_bar
    silence()


@contextlib.contextmanager
def _memory_of_torch() -> Iterator[None]:
    """Within, PyTorch's RuntimeError about too little memory becomes a MemoryError, which has advice."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "allocate memory" in text or "out of memory" in text:
            raise MemoryError(f"{SMALLER_BATCH} ({text})") from error
        raise


if __name__ == "__main__":
    sys.exit(main())
