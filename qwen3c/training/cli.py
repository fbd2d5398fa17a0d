"""Arguments -> a stage: `python train.py pretrain | sft | grpo`, or `--help`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import one_line
from . import TrainingError
from .checkpoint import checkpoints
from .shapes import PRESETS, Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from .trainer import Settings

LIBRARIES = ("torch", "transformers", "accelerate", "matplotlib", "tqdm")
NEEDED = "needs the extra `train`: pip install torch==2.13.0, then pip install -e '.[train]'"


def main(argv: Sequence[str] | None = None) -> int:
    """The command `train.py`: 0 done, 2 refused or diverged, 130 or 143 stopped; no traceback."""
    args = _parser().parse_args(argv)
    try:
        _check_libraries()
        from .trainer import Stopped

        try:
            args.stage_function(args)
        except Stopped as stopped:
            print(f"train.py: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError as error:
        return _fail(f"out of memory: {error}")
    except (ValueError, ImportError) as error:
        return _fail(one_line(error))
    except RuntimeError as error:  # torch: out of memory, above all
        return _fail(one_line(error))
    return 0


def _fail(message: str) -> int:
    print("train.py: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _check_libraries() -> None:
    import importlib.util

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are local directories
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"training {NEEDED} ({', '.join(missing)} missing)")
    from transformers.utils import logging

    silence: Any = logging.disable_progress_bar
    silence()


# ----------------------------------------------------------------------------
# Arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a model: text in, a Hugging Face directory out, which export.py reads.",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="pretrain | sft | grpo")

    pretrain = stages.add_parser("pretrain", help="the next token of text, from random weights or a model")
    pretrain.set_defaults(stage_function=_pretrain)
    pretrain.add_argument("data", nargs="+", type=Path, metavar="DATA", help="text files, or folders of them")
    pretrain.add_argument(
        "--validation", nargs="+", type=Path, metavar="DATA", help="text held out (default: a share of DATA)"
    )
    pretrain.add_argument(
        "--validation-fraction",
        type=_fraction,
        default=0.05,
        help="share of documents held out (default: 0.05)",
    )
    _new_model_arguments(pretrain)
    _common_arguments(pretrain, steps=2000, batch=8, micro_batch=8, learning_rate=2e-3)

    sft = stages.add_parser("sft", help="the assistant's side of conversations")
    sft.set_defaults(stage_function=_sft)
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
        type=_fraction,
        default=0.05,
        help="share of replies held out (default: 0.05)",
    )
    sft.add_argument(
        "--context",
        type=_positive,
        metavar="N",
        help="tokens of a packed row (default: the model's, at most 2048)",
    )
    _common_arguments(sft, steps=500, batch=8, micro_batch=8, learning_rate=3e-4)

    grpo = stages.add_parser("grpo", help="reinforcement: rewards of completions that the engine samples")
    grpo.set_defaults(stage_function=_grpo)
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
        "--validation-fraction", type=_fraction, default=0.1, help="share of tasks held out (default: 0.1)"
    )
    _policy_arguments(grpo)
    _common_arguments(grpo, steps=200, batch=16, micro_batch=64, learning_rate=5e-5)
    return parser


def _policy_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("completions")
    group.add_argument(
        "--completions", type=_positive, default=8, metavar="G", help="per prompt (default: 8)"
    )
    group.add_argument(
        "--max-tokens", type=_positive, default=64, metavar="N", help="of a completion (default: 64)"
    )
    group.add_argument(
        "--temperature", type=_rate, default=1.0, metavar="X", help="they are sampled at (default: 1)"
    )
    group.add_argument(
        "--updates",
        type=_positive,
        default=1,
        metavar="N",
        help="of the weights per step's completions (default: 1)",
    )
    group.add_argument(
        "--clip-ratio", type=_fraction, default=0.2, metavar="X", help="of probabilities (default: 0.2)"
    )
    group.add_argument(
        "--kl",
        type=float,
        default=0.02,
        metavar="X",
        help="weight of the divergence from the reference (default: 0.02)",
    )


def _new_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="go on training this model instead of a new one"
    )
    new = parser.add_argument_group("a new model")
    new.add_argument("--preset", choices=PRESETS, default="nano", help="its sizes (default: nano)")
    for name in Shape.__dataclass_fields__:
        new.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=argparse.SUPPRESS)
    new.description = "single sizes: " + ", ".join(
        f"--{n.replace('_', '-')} N" for n in Shape.__dataclass_fields__
    )
    new.add_argument(
        "--tokenizer",
        default="bpe",
        metavar="bpe|char|DIR",
        help="trained on the data, characters, or a directory's",
    )
    new.add_argument(
        "--vocab-size", type=int, default=4096, metavar="N", help="tokens of a new BPE (default: 4096)"
    )


def _common_arguments(
    parser: argparse.ArgumentParser, steps: int, batch: int, micro_batch: int, learning_rate: float
) -> None:
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
        "--estimate", action="store_true", help="print parameters, memory and FLOPs, then stop"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    group = parser.add_argument_group("how to train")
    group.add_argument(
        "--steps",
        type=_positive,
        default=steps,
        metavar="N",
        help=f"steps of the optimiser (default: {steps})",
    )
    group.add_argument(
        "--batch", type=_positive, default=batch, metavar="N", help=f"samples per step (default: {batch})"
    )
    group.add_argument(
        "--micro-batch",
        type=_positive,
        default=micro_batch,
        metavar="N",
        help=f"samples per pass (default: {micro_batch})",
    )
    group.add_argument(
        "--learning-rate",
        type=_rate,
        default=learning_rate,
        metavar="X",
        help=f"the highest (default: {learning_rate:g})",
    )
    group.add_argument(
        "--warmup", type=int, metavar="N", help="steps of linear rise (default: 5 %% of the steps)"
    )
    group.add_argument(
        "--min-learning-rate",
        type=_fraction,
        default=0.1,
        metavar="X",
        help="the last, as a share of the highest (default: 0.1)",
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.1, metavar="X", help="on matrices (default: 0.1)"
    )
    group.add_argument(
        "--clip", type=_rate, default=1.0, metavar="X", help="largest norm of the gradient (default: 1)"
    )
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of matrix products (default: fp32)"
    )
    group.add_argument(
        "--seed", type=int, default=1, metavar="N", help="of weights, order and samples (default: 1)"
    )
    group.add_argument(
        "--evaluate-every", type=_positive, default=100, metavar="N", help="steps (default: 100)"
    )
    group.add_argument(
        "--checkpoint-every", type=_positive, default=100, metavar="N", help="steps (default: 100)"
    )
    group.add_argument(
        "--keep", type=_positive, default=2, metavar="N", help="checkpoints that stay (default: 2)"
    )
    group.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: as the engine)")
    group.add_argument(
        "--shard", action="store_true", help="spread weights and optimiser over the processes (FSDP)"
    )
    group.add_argument(
        "--compile", action="store_true", help="torch.compile: a slow start, then faster steps"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _settings(args: argparse.Namespace) -> Settings:
    """Settings, and the threads they run on."""
    import torch

    from ..cpu import default_threads
    from .trainer import Settings

    if args.warmup is not None and not 0 <= args.warmup <= args.steps:
        raise TrainingError(f"--warmup {args.warmup} is not from 0 to --steps {args.steps}")
    torch.set_num_threads(args.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or default_threads())
    return Settings(
        out=args.out,
        warmup=max(1, args.steps // 20) if args.warmup is None else args.warmup,
        **{
            name: getattr(args, name)
            for name in ("steps", "batch", "micro_batch", "learning_rate", "min_learning_rate", "weight_decay", "clip",
                         "precision", "seed", "evaluate_every", "checkpoint_every", "keep", "shard", "compile", "quiet")
        },
    )  # fmt: skip


def _checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from. TrainingError if there is one and nobody asked to."""
    found = checkpoints(args.out)
    if found and not args.resume:
        raise TrainingError(
            f"{args.out}: holds a run already; --resume goes on with it, or choose another directory"
        )
    return found[-1] if found else None


def _load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model in float32 and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from .vocabulary import load

    if not (directory / "config.json").is_file():
        raise TrainingError(f"{directory}: has no config.json; expected a Hugging Face directory")
    tokenizer = load(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # the libraries raise what they like
        raise TrainingError(f"{directory}: {' '.join(str(error).split())[:300]}") from None
    return model, tokenizer


# ----------------------------------------------------------------------------
# Stages


def _pretrain(args: argparse.Namespace) -> None:
    from .pretrain import Pretraining
    from .shapes import new_model
    from .text import Windows, read_documents, split
    from .vocabulary import characters, load, train_bpe

    settings = _settings(args)
    documents = read_documents(args.data)
    if args.validation:
        train, validation = documents, read_documents(args.validation)
    else:
        train, validation = split(documents, args.validation_fraction, args.seed)

    resume = None if args.estimate else _checkpoint(args)
    if resume or args.model:
        model, tokenizer = _load(resume or args.model)
    else:
        if args.tokenizer == "bpe":
            tokenizer = train_bpe((d.text for d in train), args.vocab_size)
        else:
            tokenizer = characters() if args.tokenizer == "char" else load(args.tokenizer)
        model = new_model(_shape(args), tokenizer, args.seed)

    context = args.context or model.config.max_position_embeddings
    if args.estimate:
        return _estimate(model, settings, context)
    Pretraining(
        settings, model, tokenizer, resume,
        Windows(train, tokenizer, context, args.seed), Windows(validation, tokenizer, context, args.seed),
    ).run()  # fmt: skip


def _sft(args: argparse.Namespace) -> None:
    from .conversations import read_samples, split
    from .sft import FineTuning

    settings = _settings(args)
    model, tokenizer = _load(args.model)
    limit = model.config.max_position_embeddings
    context = args.context or min(limit, 2048)
    if context > limit:
        raise TrainingError(f"--context {context} exceeds the model's {limit}")
    if args.estimate:
        return _estimate(model, settings, context)
    train, too_long = read_samples(args.data, tokenizer, context)
    if args.validation:
        validation, too_long_too = read_samples(args.validation, tokenizer, context)
        too_long += too_long_too
    else:
        train, validation = split(train, args.validation_fraction, args.seed)
    if too_long:
        print(
            f"{too_long:,} samples are longer than the context of {context} tokens and left out",
            file=sys.stderr,
        )
    resume = _checkpoint(args)
    if resume:
        model, tokenizer = _load(resume)
    FineTuning(settings, model, tokenizer, resume, train, validation, context).run()


def _grpo(args: argparse.Namespace) -> None:
    from .conversations import split
    from .grpo import GRPO, Policy, load_reward, read_tasks

    settings = _settings(args)
    reference, tokenizer = _load(args.model)
    context = reference.config.max_position_embeddings
    if args.estimate:
        return _estimate(reference, settings, context)
    policy = Policy(
        args.completions, args.max_tokens, args.temperature, args.updates, args.clip_ratio, args.kl
    )
    reward = load_reward(args.reward)
    train = [task for path in args.data for task in read_tasks(path, tokenizer, context - args.max_tokens)]
    if args.validation:
        validation = read_tasks(args.validation, tokenizer, context - args.max_tokens)
    else:
        train, validation = split(train, args.validation_fraction, args.seed)
    resume = _checkpoint(args)
    model, _ = _load(resume or args.model)
    GRPO(settings, model, tokenizer, resume, reference, policy, train, validation, reward).run()


def _estimate(model: PreTrainedModel, settings: Settings, context: int) -> None:
    from .estimate import print_estimate

    print_estimate(
        model, min(settings.micro_batch, settings.batch), context, settings.batch > settings.micro_batch
    )


def _shape(args: argparse.Namespace) -> Shape:
    given = {
        name: getattr(args, name) for name in Shape.__dataclass_fields__ if getattr(args, name) is not None
    }
    return replace(PRESETS[args.preset], **given)
