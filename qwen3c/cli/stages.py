"""The stages of train.py: arguments -> data, a model and a trainer that runs."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..training import TrainingError
from ..training.checkpoint import Inputs, check_free, checkpoints
from ..training.shapes import PRESETS, Shape
from ..training.telling import Telling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from ..training.trainer import Settings

# ----------------------------------------------------------------------------
# What the stages share


def _settings(args: argparse.Namespace) -> Settings:
    """The Settings of a run; sets PyTorch's threads too."""
    import torch

    from ..system.machine import default_threads
    from ..training.trainer import Settings

    if args.warmup is not None and not 0 <= args.warmup <= args.steps:
        raise TrainingError(f"--warmup {args.warmup} is not from 0 to --steps {args.steps}")
    torch.set_num_threads(args.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or default_threads())
    return Settings(
        out=args.out,
        warmup=max(1, args.steps // 20) if args.warmup is None else args.warmup,
        **{
            name: getattr(args, name)
            for name in ("steps", "batch", "micro_batch", "learning_rate", "min_learning_rate",
                         "weight_decay", "clip", "precision", "seed", "evaluate_every", "checkpoint_every",
                         "keep", "shard",
                         "compile", "quiet")
        },
    )  # fmt: skip


def _checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to resume from, None for a new run. TrainingError if -o holds something else."""
    found = checkpoints(args.out)
    if found and args.resume:
        return found[-1]
    if not args.force and not args.estimate:
        check_free(args.out)
    return None


def _load(directory: Path, telling: Telling) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    from ..training.loading import load_model

    with telling.doing(f"loading {directory}"):
        return load_model(directory)


def _model_input(args: argparse.Namespace, telling: Telling) -> Inputs:
    from ..training.loading import model_fingerprint

    with telling.doing(f"reading {args.model}"):
        return {"--model": model_fingerprint(args.model)}


def _estimate(model: PreTrainedModel, settings: Settings, context: int) -> None:
    from ..training.estimate import print_estimate

    print_estimate(
        model, min(settings.micro_batch, settings.batch), context, settings.batch > settings.micro_batch
    )


# ----------------------------------------------------------------------------
# Stages


def _pretrain(args: argparse.Namespace, telling: Telling) -> None:
    from ..training.pretrain import Pretraining
    from ..training.shapes import new_model
    from ..training.text import Windows, documents_fingerprint, read_documents, split
    from ..training.trainer import Start

    settings = _settings(args)
    resume = _checkpoint(args)
    _keep_out_of_data(args)
    with telling.doing("reading text"):
        train = read_documents(args.data, telling.say)
        if args.validation:
            validation = read_documents(args.validation, telling.say)
        else:
            train, validation = split(train, args.validation_fraction, args.seed)

    if resume and not args.estimate:
        model, tokenizer = _load(resume, telling)
    elif args.model:
        model, tokenizer = _load(args.model, telling)
    else:
        tokenizer = _new_tokenizer(args, [d.text for d in train], telling)
        model = new_model(_shape(args), tokenizer, args.seed)

    limit = model.config.max_position_embeddings
    context = args.context or limit
    if context > limit:
        raise TrainingError(f"--context {context} exceeds the model's {limit}")
    if args.estimate:
        return _estimate(model, settings, context)
    inputs: Inputs = {
        "stage": "pretrain",
        **(_model_input(args, telling) | {"--context": context} if args.model else _new_model_inputs(args)),
        "training data": documents_fingerprint(train),
        "held-out data": documents_fingerprint(validation),
    }
    with telling.doing("cutting the text into tokens"):
        windows = [Windows(documents, tokenizer, context, args.seed) for documents in (train, validation)]
    Pretraining(settings, Start(model, tokenizer, resume, inputs, telling), *windows).run()


def _keep_out_of_data(args: argparse.Namespace) -> None:
    """TrainingError if the run would write into a folder whose files are its training data."""
    for path in [*args.data, *(args.validation or [])]:
        if path.is_dir() and args.out.resolve().is_relative_to(path.resolve()):
            raise TrainingError(
                f"-o {args.out} lies in the data, {path}: what it writes would be read as text"
            )


def _new_tokenizer(args: argparse.Namespace, texts: list[str], telling: Telling) -> PreTrainedTokenizerFast:
    from ..training.vocabulary import characters, load, train_bpe

    if args.tokenizer == "char":
        return characters()
    if args.tokenizer != "bpe":
        return load(args.tokenizer)
    megabytes = sum(map(len, texts)) / 1e6
    with telling.doing(f"training a tokenizer of {args.vocab_size:,} tokens on {megabytes:.1f} MB of text"):
        return train_bpe(texts, args.vocab_size)


def _shape(args: argparse.Namespace) -> Shape:
    given = {
        name: getattr(args, name) for name in Shape.__dataclass_fields__ if getattr(args, name) is not None
    }
    return replace(PRESETS[args.preset], **given)


def _new_model_inputs(args: argparse.Namespace) -> Inputs:
    """The sizes and the tokenizer of a new model."""
    from ..training.checkpoint import file_fingerprint

    shape: Inputs = {f"--{name.replace('_', '-')}": value for name, value in asdict(_shape(args)).items()}
    if args.tokenizer == "bpe":
        return {**shape, "--tokenizer": "bpe", "--vocab-size": args.vocab_size}
    if args.tokenizer == "char":
        return {**shape, "--tokenizer": "char"}
    return {**shape, "--tokenizer": file_fingerprint([Path(args.tokenizer) / "tokenizer.json"])}


def _sft(args: argparse.Namespace, telling: Telling) -> None:
    from ..training.conversations import read_samples, samples_fingerprint, split
    from ..training.sft import FineTuning
    from ..training.trainer import Start

    settings = _settings(args)
    resume = _checkpoint(args)
    model, tokenizer = _load(args.model, telling)
    limit = model.config.max_position_embeddings
    context = args.context or min(limit, 2048)
    if context > limit:
        raise TrainingError(f"--context {context} exceeds the model's {limit}")
    if args.estimate:
        return _estimate(model, settings, context)
    with telling.doing("cutting the conversations into tokens"):
        train, too_long = read_samples(args.data, tokenizer, context)
        if args.validation:
            validation, too_long_too = read_samples(args.validation, tokenizer, context)
            too_long += too_long_too
        else:
            train, validation = split(train, args.validation_fraction, args.seed)
    if too_long:
        telling.say(f"{too_long:,} samples are longer than the context of {context} tokens and left out")
    inputs: Inputs = {
        "stage": "sft",
        **_model_input(args, telling),
        "--context": context,
        "training data": samples_fingerprint(train),
        "held-out data": samples_fingerprint(validation),
    }
    if resume:
        model, tokenizer = _load(resume, telling)
    start = Start(model, tokenizer, resume, inputs, telling)
    FineTuning(settings, start, train, validation, context).run()


def _grpo(args: argparse.Namespace, telling: Telling) -> None:
    from ..training.conversations import split
    from ..training.grpo import GRPO, Policy, load_reward, read_tasks, reward_fingerprint, tasks_fingerprint
    from ..training.trainer import Start

    settings = _settings(args)
    resume = _checkpoint(args)
    reward = load_reward(args.reward)
    reference, tokenizer = _load(args.model, telling)
    context = reference.config.max_position_embeddings
    if args.estimate:
        return _estimate(reference, settings, context)
    fields = ("completions", "max_tokens", "temperature", "updates", "clip_ratio", "kl", "loss")
    policy = Policy(**{name: getattr(args, name) for name in fields})
    room = context - args.max_tokens
    if room < 1:
        raise TrainingError(
            f"--max-tokens {args.max_tokens} leaves no room for a prompt: the context is {context}"
        )
    with telling.doing("cutting the tasks into tokens"):
        train = [task for path in args.data for task in read_tasks(path, tokenizer, room)]
        if args.validation:
            validation = read_tasks(args.validation, tokenizer, room)
        else:
            train, validation = split(train, args.validation_fraction, args.seed)
    inputs: Inputs = {
        "stage": "grpo",
        **_model_input(args, telling),
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(policy).items()},
        "--reward": args.reward,
        "reward function": reward_fingerprint(reward),
        "training data": tasks_fingerprint(train),
        "held-out data": tasks_fingerprint(validation),
    }
    model, _ = _load(resume or args.model, telling)
    start = Start(model, tokenizer, resume, inputs, telling)
    GRPO(settings, start, reference, policy, train, validation, reward).run()


STAGES = {"pretrain": _pretrain, "sft": _sft, "grpo": _grpo}
