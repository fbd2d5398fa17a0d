"""What train.py is told: `pretrain | sft | grpo` and their options, each number checked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..training.shapes import PRESETS, Shape
from .command import Parser, at_least

SCRIPT = "train.py"
# their defaults are None, to tell whether the user gave them
NEW_MODEL = {"preset": "nano", "tokenizer": "bpe", "vocab_size": 4096}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """A stage and its options, with defaults; exits with an error if they are wrong."""
    parser = new_parser()
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


class _StageParser(Parser):
    """The parser of one stage: argparse makes it without the name of the script."""

    def __init__(self, **options: Any) -> None:
        super().__init__(SCRIPT, **options)


def new_parser() -> Parser:
    """The parser; stages and options are in the order of --help."""
    parser = Parser(
        SCRIPT, description="Train a model: text in, a Hugging Face directory out, which export.py reads."
    )
    stages = parser.add_subparsers(
        dest="stage",
        required=True,
        metavar="pretrain | sft | grpo",
        parser_class=_StageParser,
    )
    _pretrain_arguments(stages)
    _sft_arguments(stages)
    _grpo_arguments(stages)
    return parser


def _pretrain_arguments(stages: Any) -> None:
    pretrain = stages.add_parser("pretrain", help="the next token of text, from random weights or a model")
    add = pretrain.add_argument
    add("data", nargs="+", type=Path, metavar="DATA", help="text files, or folders of them")
    add("--validation", nargs="+", type=Path, metavar="DATA", help="text held out (default: a share of DATA)")
    add(
        "--validation-fraction",
        type=fraction,
        default=0.05,
        help="share of documents held out (default: 0.05)",
    )
    _new_model_arguments(pretrain)
    _common_arguments(pretrain, steps=2000, batch=8, micro_batch=8, learning_rate=2e-3)


def _sft_arguments(stages: Any) -> None:
    sft = stages.add_parser("sft", help="the assistant's side of conversations")
    add = sft.add_argument
    add("data", type=Path, metavar="CHAT.jsonl", help='one {"messages": [...]} a line')
    add("--model", type=Path, required=True, metavar="DIR", help="the model to tune")
    add("--validation", type=Path, metavar="CHAT.jsonl",
        help="conversations held out (default: a share of DATA)")  # fmt: skip
    add(
        "--validation-fraction", type=fraction, default=0.05, help="share of replies held out (default: 0.05)"
    )
    add("--context", type=at_least(1), metavar="N",
        help="tokens of a packed row (default: the model's, at most 2048)")  # fmt: skip
    _common_arguments(sft, steps=500, batch=8, micro_batch=8, learning_rate=3e-4)


def _grpo_arguments(stages: Any) -> None:
    grpo = stages.add_parser("grpo", help="reinforcement: rewards of completions that the engine samples")
    add = grpo.add_argument
    add("data", nargs="+", type=Path, metavar="TASKS.jsonl",
        help='one {"messages": [...]} or {"prompt": "..."} a line')  # fmt: skip
    add("--model", type=Path, required=True, metavar="DIR", help="the model to tune, and the reference")
    add("--reward", required=True, metavar="MODULE:FUNCTION", help="(prompt, completion, task) -> number")
    add("--validation", type=Path, metavar="TASKS.jsonl", help="tasks held out (default: a share of DATA)")
    add("--validation-fraction", type=fraction, default=0.1, help="share of tasks held out (default: 0.1)")
    _policy_arguments(grpo)
    _common_arguments(grpo, steps=200, batch=16, micro_batch=64, learning_rate=5e-5)


def _policy_arguments(parser: Parser) -> None:
    add = parser.add_argument_group("completions").add_argument
    add("--completions", type=at_least(2), default=8, metavar="G", help="per prompt (default: 8)")
    add("--max-tokens", type=at_least(1), default=64, metavar="N", help="of a completion (default: 64)")
    add("--temperature", type=positive, default=1.0, metavar="X", help="they are sampled at (default: 1)")
    add("--updates", type=at_least(1), default=1, metavar="N",
        help="of the weights per step's completions (default: 1)")  # fmt: skip
    add("--clip-ratio", type=fraction, default=0.2, metavar="X", help="of probabilities (default: 0.2)")
    add("--kl", type=not_negative, default=0.02, metavar="X",
        help="weight of the divergence from the reference (default: 0.02)")  # fmt: skip
    add("--loss", choices=("dapo", "grpo"), default="dapo", help="mean over tokens, as DAPO and TRL have it, "
        "or over completions, as the paper of GRPO (default: dapo)")  # fmt: skip


def _new_model_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="go on training this model instead of a new one"
    )
    group = parser.add_argument_group("a new model")
    sizes = [f"--{name.replace('_', '-')}" for name in Shape.__dataclass_fields__]
    group.description = "single sizes: " + ", ".join(f"{size} N" for size in sizes)
    add = group.add_argument
    add("--preset", choices=PRESETS, help="its sizes (default: nano)")
    for size in sizes:
        add(size, type=int, metavar="N", help=argparse.SUPPRESS)
    add("--tokenizer", metavar="bpe|char|DIR",
        help="trained on the data (bpe, the default), printable ASCII (char), or a directory's")  # fmt: skip
    add("--vocab-size", type=at_least(1), metavar="N", help="tokens of a new BPE (default: 4096)")


def _common_arguments(parser: Parser, **defaults: float) -> None:
    """Add the options of every stage. defaults: those of steps, batch, micro_batch and learning_rate."""
    add = parser.add_argument
    add("-o", "--out", type=Path, required=True, metavar="DIR",
        help="where the model, checkpoints and metrics go")  # fmt: skip
    add("--resume", action="store_true", help="go on from the newest checkpoint in DIR, if there is one")
    add(
        "--force", action="store_true", help="begin anew in a DIR that holds a run or a model: it is replaced"
    )
    add("--estimate", action="store_true", help="print parameters, memory and FLOPs, then stop")
    add("--quiet", action="store_true", help="print errors only")
    group = parser.add_argument_group("how to train")
    _optimiser_arguments(group)
    _run_arguments(group)
    for name, default in defaults.items():
        [action] = [action for action in parser._actions if action.dest == name]
        action.help = f"{action.help} (default: {default:g})"
    parser.set_defaults(**defaults)


def _optimiser_arguments(group: Any) -> None:
    add = group.add_argument
    add("--steps", type=at_least(1), metavar="N", help="steps of the optimiser")
    add("--batch", type=at_least(1), metavar="N", help="samples per step")
    add("--micro-batch", type=at_least(1), metavar="N", help="samples per pass")
    add("--learning-rate", type=positive, metavar="X", help="the highest")
    add("--warmup", type=at_least(0), metavar="N", help="steps of linear rise (default: 5 %% of the steps)")
    add("--min-learning-rate", type=share, default=0.1, metavar="X",
        help="the last, as a share of the highest (default: 0.1)")  # fmt: skip
    add("--weight-decay", type=not_negative, default=0.1, metavar="X", help="on matrices (default: 0.1)")
    add("--clip", type=positive, default=1.0, metavar="X",
        help="largest norm of the gradient (default: 1)")  # fmt: skip
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products (default: fp32)")


def _run_arguments(group: Any) -> None:
    add = group.add_argument
    add("--seed", type=at_least(0), default=1, metavar="N", help="of weights, order and samples (default: 1)")
    add("--evaluate-every", type=at_least(1), default=100, metavar="N", help="steps (default: 100)")
    add("--checkpoint-every", type=at_least(1), default=100, metavar="N", help="steps (default: 100)")
    add("--keep", type=at_least(1), default=2, metavar="N", help="checkpoints that stay (default: 2)")
    add("--threads", type=at_least(1), metavar="N", help="CPU threads (default: as the engine)")
    add("--shard", action="store_true", help="spread weights and optimiser over the processes (FSDP)")
    add("--compile", action="store_true", help="torch.compile: a slow start, then faster steps")


# ----------------------------------------------------------------------------
# Numbers


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
