"""The modes of run.py: each takes the arguments and returns the exit status."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..system import terminal
from .command import say_error
from .opening import context_of, new_writer, open_model, sampling, say_what_was_chosen
from .options import RAW_TOKENS, SCRIPT, TRACED_TOKENS, WINDOW
from .prompt import is_raw, may_chat, prompt_text, prompt_tokens, read_text, system_prompt

if TYPE_CHECKING:
    from ..drivers.generate import Generation
    from ..drivers.grammar import Grammar
    from ..format import ModelFile
    from ..inspect.trace import Text
    from ..model import Model
    from .cloud import Cloud


def hold_chat(args: argparse.Namespace) -> int:
    """Messages in, replies out, until there are no more messages."""
    from ..conversation import Conversation
    from .repl import Repl
    from .tools import opened_tools

    cloud = _cloud(args)
    model = open_model(args, chats=True)
    conversation = Conversation(
        model,
        context_of(args, model),
        system=system_prompt(args),
        thinking=args.thinking,
        stop=args.stop,
        max_tokens=args.max_tokens or None,
        overflow=args.overflow,
        **sampling(args),
    )
    say_what_was_chosen(args, model, conversation.session.context, args.thinking is not False)
    if cloud:
        terminal.note(cloud.describe())
    with opened_tools(args.mcp, model) as tools:
        conversation.tools = tools.functions if tools else None
        if sys.stdin.isatty():
            terminal.note("/help lists the commands, Ctrl-D leaves")
        try:
            repl = Repl(conversation, lambda: new_writer(args, model), cloud, tools, logprobs=args.logprobs,
                draft=args.drafts)  # fmt: skip
            return repl.run()
        finally:
            if cloud:
                cloud.close()


def _cloud(args: argparse.Namespace) -> Cloud | None:
    """Who is asked before the model, checked before the model is read; None if the options name nobody."""
    if args.upstream is None:
        return None
    from .cloud import Cloud, upstream_settings

    return Cloud(upstream_settings(args))


def write_reply(args: argparse.Namespace) -> int:
    """One prompt, one reply or completion."""
    from ..drivers.batch import CachedSession
    from .output import show

    text = prompt_text(args)
    model = open_model(args, chats=may_chat(args))
    raw = is_raw(args, model)
    prompt = prompt_tokens(args, model, text)
    max_tokens = RAW_TOKENS if raw and args.max_tokens is None else args.max_tokens
    session = CachedSession(model, context_of(args, model))
    grammar = _grammar(args.schema, model) if args.schema else None

    def ask(**callbacks: Any) -> Generation:
        reply = model.generate(
            prompt,
            max_tokens or None,
            session=session,
            stop=args.stop,
            logprobs=args.logprobs,
            grammar=grammar,
            draft=args.drafts,
            **sampling(args),
            **callbacks,
        )
        say_what_was_chosen(args, model, session.context, model.may_think(prompt), raw)
        if args.echo:
            print(text, end="", flush=True)
        return reply

    reply = show(ask, new_writer(args, model)).reply
    if grammar and reply.finish_reason == "length":
        terminal.note("note: the reply ended by length (-n), before its JSON was complete")
    return 130 if reply.finish_reason == "cancelled" else 0


def _grammar(path: str, model: Model) -> Grammar:
    """The grammar of the JSON schema in a file."""
    from ..drivers.grammar import Grammar

    schema = read_text(path)
    try:
        return Grammar.json_schema(model.vocabulary, schema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def trace_text(args: argparse.Namespace) -> int:
    """Show the activations of a prompt and of its continuation."""
    from ..drivers.batch import CachedSession
    from ..inspect import trace, trace_page

    if args.html:
        trace_page.check_target(args.html)
    asked = prompt_text(args)
    model = open_model(args, chats=may_chat(args))
    raw = is_raw(args, model)
    prompt = prompt_tokens(args, model, asked)
    session = CachedSession(model, context_of(args, model))
    n = TRACED_TOKENS * bool(args.html) if args.max_tokens is None else args.max_tokens
    if args.html:
        trace_page.check_size(model.config, min(len(prompt) + n, session.context))
    with terminal.waiting(f"tracing {len(prompt)} tokens and what follows them"):
        text = trace.continue_text(model, prompt, n, session=session, stop=args.stop, **sampling(args))
    say_what_was_chosen(args, model, session.context, model.may_think(prompt), raw)
    if args.html:
        _draw_page(model, text, args.html)
    level = args.level or trace.LEVELS[0]
    with terminal.waiting(f"tracing {len(text.ids)} tokens"):
        if args.json:
            lines = [json.dumps(trace.describe(model, text, level))]
        else:
            lines = list(trace.lines(model, text, level)) if args.level or not args.html else []
    for line in lines:
        print(line)
    return 0


def _draw_page(model: Model, text: Text, path: str) -> None:
    from ..inspect import trace_page

    with terminal.waiting(f"drawing {path}"):
        size = trace_page.write(model, text, path)
    size_and_seed = f"{len(text.ids)} tokens, seed {text.seed}, {size / 1e6:.1f} MB"
    terminal.note(f"{path}: {size_and_seed}; open it in a browser")


def describe_file(args: argparse.Namespace) -> int:
    """What is in a model file, the memory it takes, and whether it is damaged."""
    from ..format import ModelFile
    from ..inspect import info

    file = ModelFile(args.model)
    damaged = _damaged_tensors(file) if args.verify else []
    if args.json:
        print(json.dumps(info.describe(file) | ({"damaged": damaged} if args.verify else {})))
    else:
        print(*info.lines(file), sep="\n")
    for name in damaged:
        say_error(SCRIPT, f"{file.path}: tensor {name} is damaged: its checksum differs")
    if args.verify and not damaged:
        terminal.note(f"{file.path}: all {len(file.tensors)} tensors match their checksums")
    return 2 if damaged else 0


def _damaged_tensors(file: ModelFile) -> list[str]:
    """Names of the tensors that do not match their checksums; a progress line counts bytes meanwhile."""
    progress = terminal.Progress(
        lambda done, total, rate: f"{done / 1e9:.2f} of {total / 1e9:.2f} GB checked"
    )
    total, done, damaged = sum(tensor.size for tensor in file.tensors), 0, []
    try:
        for tensor, sound in file.verify():
            if not sound:
                damaged.append(tensor.name)
            done += tensor.size
            progress(done, total)
    finally:
        progress.clear()
    return damaged


def measure_perplexity(args: argparse.Namespace) -> int:
    """How well the model predicts a text."""
    from ..inspect.perplexity import Perplexity, measure

    text = read_text(args.file)
    model = open_model(args)
    with terminal.waiting(f"cutting {len(text)} characters into tokens"):
        ids = [*model.tokenizer.opening, *model.tokenizer.encode(text)]
    window = args.context or min(model.config.context, WINDOW if args.context is None else sys.maxsize)
    latest = Perplexity()

    def describe(done: float, total: float, rate: float) -> str:
        return f"{done:.0f} of {total:.0f} tokens  {rate:.0f} tok/s  perplexity {latest.perplexity:.4f}"

    progress = terminal.Progress(describe)

    def show(done: int, so_far: Perplexity) -> None:
        nonlocal latest
        latest = so_far
        progress(done, len(ids))

    try:
        result = measure(model, ids, window, show)
    finally:
        progress.clear()
    mean = result.nats / result.tokens
    if args.json:
        found = {"perplexity": result.perplexity, "nats_per_token": mean, "tokens": result.tokens}
        print(json.dumps(found | {"window": window}))
    else:
        over = f"over {result.tokens} tokens, windows of {window}"
        print(f"perplexity {result.perplexity:.4f} ({mean:.4f} nats per token) {over}")
    return 0


def measure_speed(args: argparse.Namespace) -> int:
    """How fast the model runs here, beside what the machine can do."""
    from ..inspect.bench import quick

    model = open_model(args)
    status = terminal.StatusLine(delay=0, interval=0)
    try:
        for line in quick(model, lambda doing: status.show(lambda: doing)):
            status.clear()
            print(line, flush=True)
    finally:
        status.clear()
    return 0


def answer_requests(args: argparse.Namespace) -> int:
    """A file of requests, a file of answers."""
    from .batch import answer_batch

    return answer_batch(args)


def serve_models(args: argparse.Namespace) -> int:
    """Models behind HTTP."""
    from .serve import serve

    return serve(args)


def look_after_models(args: argparse.Namespace) -> int:
    """The models of the Hub that are kept here: listed, or what is not needed deleted."""
    from .models import list_models, prune_models

    return prune_models(args.model, args.yes) if args.prune else list_models(args.model, args.json)


def serve_tools(args: argparse.Namespace) -> int:
    """The model as tools of an MCP host."""
    from .mcp import serve_over_stdio

    return serve_over_stdio(args)


MODES: dict[str, Callable[[argparse.Namespace], int]] = {
    "chat": hold_chat,
    "generate": write_reply,
    "trace": trace_text,
    "info": describe_file,
    "perplexity": measure_perplexity,
    "bench": measure_speed,
    "batch": answer_requests,
    "serve": serve_models,
    "mcp": serve_tools,
    "models": look_after_models,
}
