"""What train.py is told: `pretrain | sft | grpo` and their options, each number checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..training.shapes import PRESETS, Shape

# None where nobody gave them, so that it can be told from a default
NEW_MODEL = {"preset": "nano", "tokenizer": "bpe", "vocab_size": 4096}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; the usage is in --help."""
        self.exit(2, f"{self.prog.split()[0]}: error: {' '.join(message.split())}\n")


def parse(argv: Sequence[str] | None, program: str) -> argparse.Namespace:
    """program: what errors and --help call the script."""
    parser = _parser(program)
    args = parser.parse_args(argv)
    if args.resume and args.force:
        parser.error("--resume goes on with a run, --force begins anew: one of them")
    if args.stage == "pretrain":
        _check_new_model(parser, args)
    if args.stage in ("sft", "grpo") and args.out.resolve() == args.model.resolve():
        parser.error(f"-o {args.out} is the model to tune: take another directory")
    return args


def _check_new_model(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse sizes of a new model beside --model; else fill in those that were not given."""
    sizes = [name for name in Shape.__dataclass_fields__ if name != "context"]
    given = [f"--{n.replace('_', '-')}" for n in (*NEW_MODEL, *sizes) if getattr(args, n) is not None]
    if args.model is not None and given:
        verb = "belongs" if len(given) == 1 else "belong"
        parser.error(f"{', '.join(given)} {verb} to a new model; --model {args.model} has its own")
    if args.vocab_size is not None and args.tokenizer not in (None, "bpe"):
        parser.error(f"--vocab-size is for --tokenizer bpe; {args.tokenizer} has its own vocabulary")
    if args.model is not None and args.out.resolve() == args.model.resolve():
        parser.error(f"-o {args.out} is the model to go on with: take another directory")
    for name, default in NEW_MODEL.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def _parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        description="Train a model: text in, a Hugging Face directory out, which export.py reads.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="pretrain | sft | grpo")

    pretrain = stages.add_parser("pretrain", help="the next token of text, from random weights or a model")
    pretrain.add_argument("data", nargs="+", type=Path, metavar="DATA", help="text files, or folders of them")
    pretrain.add_argument(
        "--validation", nargs="+", type=Path, metavar="DATA", help="text held out (default: a share of DATA)"
    )
    pretrain.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.05,
        help="share of documents held out (default: 0.05)",
    )
    _new_model_arguments(pretrain)
    _common_arguments(pretrain, steps=2000, batch=8, micro_batch=8, learning_rate=2e-3)

    sft = stages.add_parser("sft", help="the assistant's side of conversations")
    sft.add_argument("data", type=Path, metavar="CHAT.jsonl", help='one {"messages": [...]} a line')
    sft.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model to tune")
    sft.add_argument(
        "--validation",
        type=Path,
        metavar="CHAT.jsonl",
        help="conversations held out (default: a share of DATA)",
    )
    sft.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.05,
        help="share of replies held out (default: 0.05)",
    )
    sft.add_argument(
        "--context",
        type=at_least(1),
        metavar="N",
        help="tokens of a packed row (default: the model's, at most 2048)",
    )
    _common_arguments(sft, steps=500, batch=8, micro_batch=8, learning_rate=3e-4)

    grpo = stages.add_parser("grpo", help="reinforcement: rewards of completions that the engine samples")
    grpo.add_argument(
        "data",
        nargs="+",
        type=Path,
        metavar="TASKS.jsonl",
        help='one {"messages": [...]} or {"prompt": "..."} a line',
    )
    grpo.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="the model to tune, and the reference"
    )
    grpo.add_argument(
        "--reward", required=True, metavar="MODULE:FUNCTION", help="(prompt, completion, task) -> number"
    )
    grpo.add_argument(
        "--validation", type=Path, metavar="TASKS.jsonl", help="tasks held out (default: a share of DATA)"
    )
    grpo.add_argument(
        "--validation-fraction", type=fraction, default=0.1, help="share of tasks held out (default: 0.1)"
    )
    _policy_arguments(grpo)
    _common_arguments(grpo, steps=200, batch=16, micro_batch=64, learning_rate=5e-5)
    return parser


def _policy_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("completions")
    group.add_argument(
        "--completions", type=at_least(2), default=8, metavar="G", help="per prompt (default: 8)"
    )
    group.add_argument(
        "--max-tokens", type=at_least(1), default=64, metavar="N", help="of a completion (default: 64)"
    )
    group.add_argument(
        "--temperature", type=positive, default=1.0, metavar="X", help="they are sampled at (default: 1)"
    )
    group.add_argument(
        "--updates",
        type=at_least(1),
        default=1,
        metavar="N",
        help="of the weights per step's completions (default: 1)",
    )
    group.add_argument(
        "--clip-ratio", type=fraction, default=0.2, metavar="X", help="of probabilities (default: 0.2)"
    )
    group.add_argument(
        "--kl",
        type=not_negative,
        default=0.02,
        metavar="X",
        help="weight of the divergence from the reference (default: 0.02)",
    )
    group.add_argument(
        "--loss",
        choices=("dapo", "grpo"),
        default="dapo",
        help="mean over tokens, as DAPO and TRL have it, or over completions, as the paper of GRPO (default: dapo)",
    )


def _new_model_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="go on training this model instead of a new one"
    )
    new = parser.add_argument_group("a new model")
    new.add_argument("--preset", choices=PRESETS, help="its sizes (default: nano)")
    for name in Shape.__dataclass_fields__:
        new.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=argparse.SUPPRESS)
    new.description = "single sizes: " + ", ".join(
        f"--{n.replace('_', '-')} N" for n in Shape.__dataclass_fields__
    )
    new.add_argument(
        "--tokenizer",
        metavar="bpe|char|DIR",
        help="trained on the data (bpe, the default), printable ASCII (char), or a directory's",
    )
    new.add_argument(
        "--vocab-size", type=at_least(1), metavar="N", help="tokens of a new BPE (default: 4096)"
    )


def _common_arguments(parser: Parser, steps: int, batch: int, micro_batch: int, learning_rate: float) -> None:
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where the model, checkpoints and metrics go",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR, if there is one"
    )
    parser.add_argument(
        "--force", action="store_true", help="begin anew in a DIR that holds a run or a model: it is replaced"
    )
    parser.add_argument(
        "--estimate", action="store_true", help="print parameters, memory and FLOPs, then stop"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    group = parser.add_argument_group("how to train")
    group.add_argument(
        "--steps",
        type=at_least(1),
        default=steps,
        metavar="N",
        help=f"steps of the optimiser (default: {steps})",
    )
    group.add_argument(
        "--batch", type=at_least(1), default=batch, metavar="N", help=f"samples per step (default: {batch})"
    )
    group.add_argument(
        "--micro-batch",
        type=at_least(1),
        default=micro_batch,
        metavar="N",
        help=f"samples per pass (default: {micro_batch})",
    )
    group.add_argument(
        "--learning-rate",
        type=positive,
        default=learning_rate,
        metavar="X",
        help=f"the highest (default: {learning_rate:g})",
    )
    group.add_argument(
        "--warmup", type=at_least(0), metavar="N", help="steps of linear rise (default: 5 %% of the steps)"
    )
    group.add_argument(
        "--min-learning-rate",
        type=share,
        default=0.1,
        metavar="X",
        help="the last, as a share of the highest (default: 0.1)",
    )
    group.add_argument(
        "--weight-decay", type=not_negative, default=0.1, metavar="X", help="on matrices (default: 0.1)"
    )
    group.add_argument(
        "--clip", type=positive, default=1.0, metavar="X", help="largest norm of the gradient (default: 1)"
    )
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products (default: fp32)"
    )
    group.add_argument(
        "--seed", type=at_least(0), default=1, metavar="N", help="of weights, order and samples (default: 1)"
    )
    group.add_argument(
        "--evaluate-every", type=at_least(1), default=100, metavar="N", help="steps (default: 100)"
    )
    group.add_argument(
        "--checkpoint-every", type=at_least(1), default=100, metavar="N", help="steps (default: 100)"
    )
    group.add_argument(
        "--keep", type=at_least(1), default=2, metavar="N", help="checkpoints that stay (default: 2)"
    )
    group.add_argument(
        "--threads", type=at_least(1), metavar="N", help="CPU threads (default: as the engine)"
    )
    group.add_argument(
        "--shard", action="store_true", help="spread weights and optimiser over the processes (FSDP)"
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile: a slow start, then faster steps"
    )


# ----------------------------------------------------------------------------
# Numbers


def at_least(low: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is not at least {low}")
        return value

    return whole_number


def _number(text: str, holds: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not holds(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not {expected}")
    return value


def positive(text: str) -> float:
    return _number(text, lambda x: x > 0, "a positive number")


def not_negative(text: str) -> float:
    return _number(text, lambda x: x >= 0, "a number from 0 up")


def fraction(text: str) -> float:
    return _number(text, lambda x: 0 < x < 1, "between 0 and 1")


def share(text: str) -> float:
    return _number(text, lambda x: 0 <= x <= 1, "from 0 to 1")
