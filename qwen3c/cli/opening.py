"""A model opened as the options say, and the line that tells a person what was chosen."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .. import format
from ..system import terminal
from .options import SAMPLING

if TYPE_CHECKING:
    from ..model import Model
    from .output import JsonWriter, ReplyWriter


def open_model(args: argparse.Namespace, chats: bool = False) -> Model:
    renderer = None
    if chats:
        from ..text.template import Renderer

        renderer = Renderer()
        renderer.start()  # starts in the background while the model is opened, which takes longer

    from .. import engine
    from ..model import Model
    from ..system.machine import default_threads, n_cpus

    if args.isa:
        engine.set_isa(args.isa)
    threads = args.threads or default_threads()
    with terminal.waiting(f"loading {args.model}" + " into huge pages" * args.huge_pages):
        model = Model(args.model, threads, args.kv, args.activations, args.huge_pages, renderer=renderer)
    if args.draft:
        with terminal.waiting(f"loading {args.draft}"):
            model.draft_with(Model(args.draft, threads, args.kv, args.activations, args.huge_pages))
    if model.threads > n_cpus():
        terminal.note(f"note: {model.threads} threads, but this process may use {n_cpus()} processors")
    return model


def context_of(args: argparse.Namespace, model: Model) -> int:
    from ..memory import default_context

    if args.context is None:
        return default_context(model.config, args.kv)
    if args.context > model.config.context:
        raise ValueError(f"context {args.context} is more than the model's {model.config.context}")
    return args.context or model.config.context


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING} | {"logit_bias": dict(args.logit_bias) or None}


def new_writer(args: argparse.Namespace, model: Model) -> JsonWriter | ReplyWriter:
    from .output import JsonWriter, ReplyWriter

    return JsonWriter(model.tokenizer.decode) if args.json else ReplyWriter(args.hide_thinking)


def say_what_was_chosen(
    args: argparse.Namespace, model: Model, context: int, thinking: bool, raw: bool = False
) -> None:
    """One line on stderr; thinking: whether a hybrid model may, raw: whether it completes bare text."""
    from .. import engine
    from ..memory import gib
    from ..system.machine import thread_variable
    from ..text.chat import may_think

    config, kind = model.config, model.metadata["thinking"]
    switch = "thinking on" if thinking else "thinking off"
    thinking = may_think(kind, thinking)
    s = model.sampling(thinking, **sampling(args))
    kv_bytes = context * config.kv_bytes_per_token(model.kv)
    threads_by = "built without OpenMP" if not engine.OPENMP else "-j" if args.threads else thread_variable()
    mode = {"always": "always thinks", "none": "no thinking"}.get(kind, switch)
    isa = "--isa" if args.isa else "QWEN3C_ISA" if os.environ.get("QWEN3C_ISA") else "widest here"
    parts = [
        f"{terminal.escaped(str(model.metadata['name']))} {format.label(config, model.file.encodings)} "
        f"{gib(model.file.file_size)}",
        "raw text" if raw else mode if args.mode == "chat" else f"chat template, {mode}",
        f"temperature {s.temperature:g} top-p {s.top_p:g} top-k {s.top_k}",
        f"context {context} of {config.context} (KV {model.kv}: {gib(kv_bytes)} when full)",
        f"threads {model.threads}" + (f" ({threads_by})" if threads_by else ""),
        f"{engine.isa()} ({isa})",
    ]
    terminal.note(" | ".join(parts))
    if s.temperature == 0 and thinking and not raw:
        terminal.note("note: thinking at temperature 0 tends to repeat itself without end")
