"""model.bin -> chat | generate | trace | info | perplexity | bench.

    python run.py model.bin -m chat
    python run.py model.bin -i "Why is the sky blue?"
    python run.py model.bin -m generate -i "def fibonacci(n):" -n 64

The story: arguments, the model, one line on stderr that says what was chosen, then one of the modes.
stdout gets model text, or what info, perplexity and bench were asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import terminal

if TYPE_CHECKING:
    from ..format import ModelFile
    from ..generate import Generation
    from ..model import Model
    from .output import JsonWriter, ReplyWriter

MODEL_IN_THE_BOX = Path(__file__).parents[1] / "data" / "model.bin"
RAW_TOKENS = 256  # of a completion nobody bounds: without a chat template text need not come to an end
TRACED_TOKENS = 24  # of the reply in a traced page
WINDOW = 2048  # tokens of a perplexity window, if the model's context holds as many
SAMPLING = {
    "temperature": "0 always takes the most likely token",
    "top_p": "only the most likely tokens that together reach this probability",
    "top_k": "only this many of the most likely tokens; 0: all",
    "min_p": "only tokens at least this many times as likely as the most likely",
    "presence_penalty": "taken from the logits of tokens already in the reply",
    "frequency_penalty": "the same, times how often",
    "repetition_penalty": "makes tokens of prompt and reply less likely; 1: off",
    "seed": "the same seed gives the same text on every machine",
}
TALKING = ("chat", "generate", "trace")
COMPUTING = (*TALKING, "perplexity", "bench")
# option -> the modes that use it; any other mode refuses it. --mode alone is every mode's
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt", "chat_template", "raw"), ("generate", "trace")),
    "file": ("generate", "trace", "perplexity"),
    "echo": ("generate",),
    **dict.fromkeys(
        ("system", "system_file", "reasoning", "think", "no_think", "max_tokens", "stop"), TALKING
    ),
    **dict.fromkeys((*SAMPLING, "logit_bias"), TALKING),
    "context": (*TALKING, "perplexity"),
    **dict.fromkeys(("threads", "kv", "activations", "huge_pages", "isa"), COMPUTING),
    **dict.fromkeys(("hide_thinking", "logprobs"), ("chat", "generate")),
    "json": (*TALKING, "info", "perplexity"),
    **dict.fromkeys(("level", "html"), ("trace",)),
    "verify": ("info",),
    "overflow": ("chat",),
}


def main(argv: list[str] | None = None) -> int:
    """The command run.py or qwen3c; its exit status: 0 done, 1 cannot write, 2 bad input, 130 interrupted."""
    terminal.open_streams()
    args = _parse(argv)
    try:
        if args.mode in COMPUTING:
            from ..memory import check_space_for_program

            check_space_for_program()
        status = MODES[args.mode](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # or what comes next would stand behind the terminal's ^C
        return 130
    except (ValueError, OSError, MemoryError, ImportError, RuntimeError) as error:
        return _cannot_write(error) if terminal.is_write_error(error) else _fail(terminal.one_line(error))


def _say_error(message: str) -> None:
    print(f"{terminal.program_name('run.py')}: error:", " ".join(message.split()), file=sys.stderr)


def _fail(message: str) -> int:
    _say_error(message)
    return 2


def _cannot_write(error: Exception) -> int:
    """Point stdout at /dev/null, or the flush at exit would fail again. A closed pipe (`| head`) is not an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + 13  # as if SIGPIPE had ended it
    _say_error(f"cannot write: {getattr(error, 'strerror', None) or error}")
    return 1


# ----------------------------------------------------------------------------
# Modes


def chat(args: argparse.Namespace) -> int:
    from ..conversation import Conversation
    from .repl import Repl

    model = _open_model(args, chats=True)
    conversation = Conversation(
        model,
        _context(args, model),
        system=_system(args),
        thinking=args.thinking,
        stop=args.stop,
        max_tokens=args.max_tokens or None,
        overflow=args.overflow,
        **_sampling(args),
    )
    _say_what_was_chosen(args, model, conversation.session.context, args.thinking is not False)
    if sys.stdin.isatty():
        terminal.note("/help lists the commands, Ctrl-D leaves")
    return Repl(conversation, lambda: _writer(args, model), logprobs=args.logprobs).run()


def generate(args: argparse.Namespace) -> int:
    from ..batch import CachedSession
    from .output import show

    text = _prompt_text(args)
    model = _open_model(args, chats=_may_chat(args))
    raw = _is_raw(args, model)
    prompt = _prompt_tokens(args, model, text)
    max_tokens = RAW_TOKENS if raw and args.max_tokens is None else args.max_tokens
    session = CachedSession(model, _context(args, model))

    def ask(**callbacks: Any) -> Generation:
        reply = model.generate(
            prompt, max_tokens or None, session=session, stop=args.stop, logprobs=args.logprobs,
            **_sampling(args), **callbacks,
        )  # fmt: skip
        _say_what_was_chosen(args, model, session.context, model.may_think(prompt), raw)
        if args.echo:
            print(text, end="", flush=True)
        return reply

    reply = show(ask, _writer(args, model)).reply
    return 130 if reply.finish_reason == "cancelled" else 0


def trace(args: argparse.Namespace) -> int:
    from ..batch import CachedSession
    from ..inspect import trace, trace_page

    if args.html:
        trace_page.check_target(args.html)
    prompt_text = _prompt_text(args)
    model = _open_model(args, chats=_may_chat(args))
    raw = _is_raw(args, model)
    prompt = _prompt_tokens(args, model, prompt_text)
    session = CachedSession(model, _context(args, model))
    n = TRACED_TOKENS * bool(args.html) if args.max_tokens is None else args.max_tokens
    if args.html:
        trace_page.check_size(model.config, min(len(prompt) + n, session.context))
    with terminal.waiting(f"tracing {len(prompt)} tokens and what follows them"):
        text = trace.continue_text(model, prompt, n, session=session, stop=args.stop, **_sampling(args))
    _say_what_was_chosen(args, model, session.context, model.may_think(prompt), raw)
    if args.html:
        with terminal.waiting(f"drawing {args.html}"):
            size = trace_page.write(model, text, args.html)
        size_and_seed = f"{len(text.ids)} tokens, seed {text.seed}, {size / 1e6:.1f} MB"
        terminal.note(f"{args.html}: {size_and_seed}; open it in a browser")
    level = args.level or trace.LEVELS[0]
    with terminal.waiting(f"tracing {len(text.ids)} tokens"):
        if args.json:
            lines = [json.dumps(trace.describe(model, text, level))]
        else:
            lines = list(trace.lines(model, text, level)) if args.level or not args.html else []
    for line in lines:
        print(line)
    return 0


def info(args: argparse.Namespace) -> int:
    from ..format import ModelFile
    from ..inspect import info

    file = ModelFile(args.model)
    damaged = _damaged_tensors(file) if args.verify else []
    if args.json:
        print(json.dumps(info.describe(file) | ({"damaged": damaged} if args.verify else {})))
    else:
        print(*info.lines(file), sep="\n")
    for name in damaged:
        _say_error(f"{file.path}: tensor {name} is damaged: its checksum differs")
    if args.verify and not damaged:
        terminal.note(f"{file.path}: all {len(file.tensors)} tensors match their checksums")
    return 2 if damaged else 0


def _damaged_tensors(file: ModelFile) -> list[str]:
    """Names of the tensors that do not match their checksums, found while a progress line counts bytes."""
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


def perplexity(args: argparse.Namespace) -> int:
    from ..inspect.perplexity import Perplexity, measure

    text = _read_text(args.file)
    model = _open_model(args)
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


def bench(args: argparse.Namespace) -> int:
    from ..inspect.bench import quick

    model = _open_model(args)
    status = terminal.StatusLine(delay=0, interval=0)
    try:
        for line in quick(model, lambda doing: status.show(lambda: doing)):
            status.clear()
            print(line, flush=True)
    finally:
        status.clear()
    return 0


MODES = {
    "chat": chat, "generate": generate, "trace": trace, "info": info, "perplexity": perplexity, "bench": bench,
}  # fmt: skip


# ----------------------------------------------------------------------------
# What the modes share


def _open_model(args: argparse.Namespace, chats: bool = False) -> Model:
    renderer = None
    if chats:
        from ..text.template import Renderer

        renderer = Renderer()
        renderer.start()  # beside all that follows, which takes longer

    from .. import engine
    from ..machine import default_threads, n_cpus
    from ..model import Model

    if args.isa:
        engine.set_isa(args.isa)
    threads = args.threads or default_threads()
    with terminal.waiting(f"loading {args.model}" + " into huge pages" * args.huge_pages):
        model = Model(args.model, threads, args.kv, args.activations, args.huge_pages, renderer=renderer)
    if model.threads > n_cpus():
        terminal.note(f"note: {model.threads} threads, but this process may use {n_cpus()} processors")
    return model


def _context(args: argparse.Namespace, model: Model) -> int:
    from ..memory import default_context

    if args.context is None:
        return default_context(model.config, args.kv)
    if args.context > model.config.context:
        raise ValueError(f"context {args.context} is more than the model's {model.config.context}")
    return args.context or model.config.context


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING} | {"logit_bias": dict(args.logit_bias) or None}


def _writer(args: argparse.Namespace, model: Model) -> JsonWriter | ReplyWriter:
    from .output import JsonWriter, ReplyWriter

    return JsonWriter(model.tokenizer.decode) if args.json else ReplyWriter(args.hide_thinking)


def _say_what_was_chosen(
    args: argparse.Namespace, model: Model, context: int, thinking: bool, raw: bool = False
) -> None:
    """One line on stderr; thinking: whether a hybrid model may, raw: whether it completes bare text."""
    from .. import engine
    from ..machine import thread_variable
    from ..memory import gib
    from ..text.chat import may_think

    config, kind = model.config, model.metadata["thinking"]
    switch = "thinking on" if thinking else "thinking off"
    thinking = may_think(kind, thinking)
    s = model.sampling(thinking, **_sampling(args))
    kv_bytes = context * config.kv_bytes_per_token(model.kv)
    threads_by = "built without OpenMP" if not engine.OPENMP else "-j" if args.threads else thread_variable()
    mode = {"always": "always thinks", "none": "no thinking"}.get(kind, switch)
    isa = "--isa" if args.isa else "QWEN3C_ISA" if os.environ.get("QWEN3C_ISA") else "widest here"
    parts = [
        f"{terminal.escaped(str(model.metadata['name']))} int8 g{config.group_size} {gib(model.file.file_size)}",
        "raw text" if raw else mode if args.mode == "chat" else f"chat template, {mode}",
        f"temperature {s.temperature:g} top-p {s.top_p:g} top-k {s.top_k}",
        f"context {context} of {config.context} (KV {model.kv}: {gib(kv_bytes)} when full)",
        f"threads {model.threads}" + (f" ({threads_by})" if threads_by else ""),
        f"{engine.isa()} ({isa})",
    ]
    terminal.note(" | ".join(parts))
    if s.temperature == 0 and thinking and not raw:
        terminal.note("note: thinking at temperature 0 tends to repeat itself without end")


def _system(args: argparse.Namespace) -> str | None:
    if args.system_file is not None:
        return _read_text(args.system_file).removesuffix("\n")
    return None if args.system is None else _utf8(args.system, "--system")


def _prompt_text(args: argparse.Namespace) -> str:
    """-i and --file one after the other, or stdin; one newline at the end of a file is not part of it."""
    texts = []
    if args.prompt is not None and args.prompt != "-":
        texts.append(_utf8(args.prompt, "--prompt"))
    if args.file is not None or not texts:
        texts.append(_read_text(args.file or "-").removesuffix("\n"))
    return "\n".join(texts)


def _is_raw(args: argparse.Namespace, model: Model) -> bool:
    """Whether the prompt is text to complete, not a message to answer: the rule that --help states."""
    return not (_is_message(args) or (args.without_mode and not args.raw and model.file.template))


def _is_message(args: argparse.Namespace) -> bool:
    """Whether an option makes the prompt a message to answer."""
    given = (args.system, args.system_file, args.thinking)
    return bool(args.chat_template) or any(value is not None for value in given)


def _may_chat(args: argparse.Namespace) -> bool:
    """Whether the chat template is used, as far as the options alone say."""
    return _is_message(args) or (args.without_mode and not args.raw)


def _prompt_tokens(args: argparse.Namespace, model: Model, text: str) -> list[int]:
    if _is_raw(args, model):
        return [*model.tokenizer.opening, *model.tokenizer.encode(text)]
    if not text.strip():
        raise ValueError("prompt is empty: there is nothing to answer")
    system = _system(args)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return model.chat_prompt([*messages, {"role": "user", "content": text}], args.thinking)


def _read_text(path: str) -> str:
    """A text file; "-" is stdin."""
    if path == "-" and sys.stdin.isatty():
        terminal.note("reading from the terminal; Ctrl-D ends the text")
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        name = "stdin" if path == "-" else path
        raise ValueError(f"{name}: byte {error.start} is not UTF-8 text") from None


def _utf8(argument: str, name: str) -> str:
    """Python hands over arguments that are not UTF-8 as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start} is not UTF-8 text") from None
    return argument


# ----------------------------------------------------------------------------
# Arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; the usage is in --help."""
        self.exit(_fail(message))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_intermixed_args(argv)
    given = {action.dest: action for action in parser._actions if _is_given(action, args)}
    args.without_mode = args.mode is None
    args.mode = args.mode or _mode_without_m(given.keys())
    for dest, action in given.items():
        if args.mode not in USED_BY[dest]:
            *owners, last = USED_BY[dest]
            owner = f"{', '.join(owners)} or {last}" if owners else last
            parser.error(f"{'/'.join(action.option_strings)} belongs to -m {owner}, not to -m {args.mode}")
    _check_combination(parser, args)
    args.thinking = True if args.think else False if args.no_think else args.reasoning
    args.kv, args.activations = args.kv or "f16", args.activations or "int8"
    args.model = _model_path(parser, args)
    return args


def _is_given(action: argparse.Action, args: argparse.Namespace) -> bool:
    return action.dest in USED_BY and getattr(args, action.dest) is not action.default


def _mode_without_m(given: Collection[str]) -> str:
    """The mode that alone uses an option that is given; else chat on a terminal without a prompt; else generate."""
    for dest in given:
        if len(USED_BY[dest]) == 1:
            return USED_BY[dest][0]
    has_prompt = not {"prompt", "file", "chat_template", "raw"}.isdisjoint(given)
    return "chat" if sys.stdin.isatty() and not has_prompt else "generate"


def _model_path(parser: _Parser, args: argparse.Namespace) -> str:
    """The model that is named, else that of the environment, else the one in the box."""
    paths = args.paths
    if args.mode == "perplexity":
        if args.file is None and paths:
            args.file = paths.pop()
        if args.file is None:
            parser.error(f"-m perplexity needs a text: {parser.prog} [MODEL] -m perplexity FILE")
    for path in paths:
        if path in MODES and not os.path.exists(path):
            parser.error(f"{path}: No such file or directory; did you mean -m {path}?")
    if len(paths) > 1:
        parser.error(f"one model at a time, not {len(paths)}: {' '.join(paths)}")
    model: str = paths[0] if paths else os.environ.get("QWEN3C_MODEL") or str(MODEL_IN_THE_BOX)
    if not paths and not os.path.exists(model):
        parser.error(f"which model? There is none at {model}")
    return model


def _check_combination(parser: _Parser, args: argparse.Namespace) -> None:
    if args.echo and args.json:
        parser.error("--echo is for text; with --json the prompt is not shown")
    if args.hide_thinking and args.json:
        parser.error("--hide-thinking is for text; with --json thinking has a field of its own")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs needs --json, where they are shown")
    if args.system is not None and args.system_file is not None:
        parser.error("--system and --system-file are two system prompts")
    if args.raw and (args.system is not None or args.system_file is not None):
        parser.error("--raw completes text, which has no system prompt (-y, --system-file)")
    if args.raw and (args.think or args.no_think or args.reasoning is not None):
        parser.error("--raw completes text, which has no switch for thinking (-r, --think, --no-think)")


def _at_least(low: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is less than {low}")
        return value

    return number


def _zero_or_one(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0 nor 1")
    return text == "1"


def _bias(text: str) -> tuple[int, float]:
    id, _, bias = text.partition("=")
    try:
        return int(id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS, such as 151645=-5") from None


def _parser() -> _Parser:
    parser = _Parser(
        prog=(prog := terminal.program_name("run.py")),
        usage=f"{prog} [MODEL] [-m {'|'.join(MODES)}] [options]",
        description="Run a model.bin: chat with it, complete text, look into it, measure it.",
        epilog="Without -m a model with a chat template chats on a terminal and answers what comes with -i, --file "
        "or a pipe; -m generate, --raw and a model without a template complete it as text, and --chat-template, -y, "
        "-r, --think and --no-think make -m generate answer too. "
        "Sampling that is not given comes from the model's generation_config, else from what its "
        "makers recommend (thinking: 0.6/0.95/20, not thinking: 0.7/0.8/20).",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="MODEL",
        help="file made by export.py (default: QWEN3C_MODEL, else the model in the box)",
    )
    add("-m", "--mode", choices=MODES, help="chat; generate: one reply or completion; trace: look inside "
        "while a text flows through; info: what is in the file and the memory it takes; perplexity FILE: how well the model predicts a text; "
        "bench: how fast it runs here, beside what the machine can do")  # fmt: skip
    add("--version", action="version", version=_version())
    _add_text(parser.add_argument_group("text"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_machine(parser.add_argument_group("machine"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_text(group: Any) -> None:
    add = group.add_argument
    add("-i", "--prompt", metavar="TEXT", help="the prompt; - is stdin, as is no -i at all")
    add("--file", metavar="FILE", help="read the prompt, or the text of perplexity, from a file; after -i")
    kind = group.add_mutually_exclusive_group().add_argument
    kind("--chat-template", action="store_true", help="the prompt is a message to answer, also with -m generate "
        "(implied by -y, -r, --think and --no-think)")  # fmt: skip
    kind("--raw", action="store_true", help="the prompt is text to complete, also without -m")
    add("--echo", action="store_true", help="generate: print the prompt before what follows it")
    add("-y", "--system", metavar="TEXT", help="system prompt (default: none)")
    add("--system-file", metavar="FILE", help="system prompt from a file")
    thinking = group.add_mutually_exclusive_group().add_argument
    thinking("-r", "--reasoning", type=_zero_or_one, metavar="0|1",
        help="thinking off or on (default: as the model does, which is on)")  # fmt: skip
    thinking("--think", action="store_true", help="the same as -r 1")
    thinking("--no-think", action="store_true", help="the same as -r 0")
    add(
        "-n",
        "--max-tokens",
        type=_at_least(0),
        metavar="N",
        help=f"most tokens of a reply; 0: what the context holds (default: 0; raw text {RAW_TOKENS})",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end the reply before TEXT; repeatable")


def _add_sampling(group: Any) -> None:
    letters = {"temperature": "-t", "top_p": "-p", "seed": "-s"}
    for name, what in SAMPLING.items():
        flags = [*filter(None, [letters.get(name)]), "--" + name.replace("_", "-")]
        flags += ["--repeat-penalty"] * (name == "repetition_penalty")
        kind = int if name in ("top_k", "seed") else float
        group.add_argument(*flags, dest=name, type=kind, metavar="N" if kind is int else "X", help=what)
    group.add_argument(
        "--logit-bias", action="append", default=[], type=_bias, metavar="TOKEN=BIAS",
        help="add BIAS to the logit of a token id; repeatable",
    )  # fmt: skip


def _add_machine(group: Any) -> None:
    add = group.add_argument
    add(
        "-c",
        "--context",
        "--ctx",
        type=_at_least(0),
        metavar="N",
        help="positions; 0: the model's "
        "(default: 8192, or what the model and half of the free memory hold; perplexity: windows of 2048)",
    )
    add("--overflow", choices=("stop", "drop"), help="chat: what happens when the context is full: stop refuses "
        "the message (the default), drop lets the oldest turns go")  # fmt: skip
    add("-j", "--threads", type=_at_least(1), metavar="N",
        help="default: QWEN3C_THREADS, else OMP_NUM_THREADS, else what this machine can feed")  # fmt: skip
    add("--kv", choices=("int8", "f16", "f32"),
        help="type of the KV cache: int8 takes half the memory of f16 (default: f16)")  # fmt: skip
    add("--activations", choices=("int8", "float32"),
        help="float32 is slow and for comparing with other programs (default: int8)")  # fmt: skip
    add("--huge-pages", action="store_true", help="copy the weights into memory of large pages: more bandwidth for "
        "a slower start and memory of their own")  # fmt: skip
    add("--isa", metavar="NAME", help="instruction set (default: QWEN3C_ISA, else the widest here)")


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--hide-thinking", action="store_true", help="show the answer only")
    add("--json", action="store_true", help="one line of JSON per reply")
    add("--logprobs", type=_at_least(0), metavar="N", help="with --json: log-probability of each token of "
        "the reply, and the N most likely ones beside it")  # fmt: skip
    add("--level", choices=("input_flow", "compact", "verbose"), help="trace: the modules and their shapes "
        "(the default); the range of every activation; also types, bytes, errors and every weight")  # fmt: skip
    add("--html", metavar="FILE", help="trace: write one page to look at: norms, attention, the predictions "
        f"after each layer, and what else the next tokens might have been (-n, default {TRACED_TOKENS})")  # fmt: skip
    add("--verify", action="store_true", help="info: read every tensor and compare its checksum")


def _version() -> str:
    from .. import __version__

    return f"qwen3c {__version__}"
