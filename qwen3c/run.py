"""model.bin -> chat | generate | trace | info | perplexity | bench.

    python run.py model.bin -m chat
    python run.py model.bin -i "def fibonacci(n):" -n 64

The story: arguments, the model, one line on stderr that says what was chosen, then one of the modes.
stdout gets model text, or what info, perplexity and bench were asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import terminal

if TYPE_CHECKING:
    from .generate import Generation
    from .model import Model
    from .output import JsonWriter, ReplyWriter

MODEL_IN_THE_BOX = Path(__file__).with_name("data") / "model.bin"
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


def main(argv: list[str] | None = None) -> int:
    """The command `run.py`; returns the exit status: 0 done, 1 cannot write, 2 bad input, 130 interrupted."""
    terminal.open_streams()
    args = _parse(argv)
    try:
        status = MODES[args.mode](args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # or what comes next would stand behind the terminal's ^C
        return 130
    except (ValueError, OSError, MemoryError, ImportError) as error:
        if isinstance(error, OSError) and error.filename is None:
            return _cannot_write(error)
        return _fail(terminal.one_line(error))


def _fail(message: str) -> int:
    print("run.py: error:", " ".join(message.split()), file=sys.stderr)
    return 2


def _cannot_write(error: OSError) -> int:
    """What is still buffered must not fail again at exit. A reader that has had enough is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return 128 + 13  # as if SIGPIPE had ended it
    print("run.py: error: cannot write:", error.strerror or error, file=sys.stderr)
    return 1


# ----------------------------------------------------------------------------
# Modes


def chat(args: argparse.Namespace) -> int:
    from .conversation import Conversation
    from .repl import Repl

    model = _open_model(args, chats=True)
    conversation = Conversation(
        model,
        _context(args, model),
        system=_system(args),
        thinking=args.thinking,
        stop=args.stop,
        max_tokens=args.max_tokens or None,
        **_sampling(args),
    )
    _say_what_was_chosen(args, model, conversation.session.context, args.thinking is not False)
    if sys.stdin.isatty():
        terminal.note("/help lists the commands, Ctrl-D leaves")
    return Repl(conversation, lambda: _writer(args, model), logprobs=args.logprobs).run()


def generate(args: argparse.Namespace) -> int:
    from .generate import CachedSession
    from .output import show

    text, raw = _prompt_text(args), _is_raw(args)
    model = _open_model(args, chats=not raw)
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
    from . import trace, trace_page
    from .generate import CachedSession

    if args.html:
        trace_page.check_target(args.html)
    prompt_text = _prompt_text(args)
    model = _open_model(args, chats=not _is_raw(args))
    prompt = _prompt_tokens(args, model, prompt_text)
    session = CachedSession(model, _context(args, model))
    n = TRACED_TOKENS * bool(args.html) if args.max_tokens is None else args.max_tokens
    if args.html:
        trace_page.check_size(model.config, min(len(prompt) + n, session.context))
    text = trace.continue_text(model, prompt, n, session=session, stop=args.stop, **_sampling(args))
    _say_what_was_chosen(args, model, session.context, model.may_think(prompt), _is_raw(args))
    if args.html:
        size = trace_page.write(model, text, args.html)
        size_and_seed = f"{len(text.ids)} tokens, seed {text.seed}, {size / 1e6:.1f} MB"
        terminal.note(f"{args.html}: {size_and_seed}; open it in a browser")
    if args.json:
        print(json.dumps(trace.describe(model, text, args.level or trace.LEVELS[0])))
    elif args.level or not args.html:
        print(*trace.lines(model, text, args.level or trace.LEVELS[0]), sep="\n")
    return 0


def info(args: argparse.Namespace) -> int:
    from . import info
    from .format import ModelFile

    file = ModelFile(args.model)
    damaged = [tensor.name for tensor, sound in file.verify() if not sound] if args.verify else []
    if args.json:
        print(json.dumps(info.describe(file) | ({"damaged": damaged} if args.verify else {})))
    else:
        print(*info.lines(file), sep="\n")
    for name in damaged:
        print(f"run.py: error: {file.path}: tensor {name} is damaged: its checksum differs", file=sys.stderr)
    if args.verify and not damaged:
        terminal.note(f"{file.path}: all {len(file.tensors)} tensors match their checksums")
    return 2 if damaged else 0


def perplexity(args: argparse.Namespace) -> int:
    from .perplexity import Perplexity, measure

    text = _read_text(args.file)
    model = _open_model(args)
    ids = [*model.tokenizer.opening, *model.tokenizer.encode(text)]
    window = args.context or min(model.config.context, WINDOW if args.context is None else sys.maxsize)
    status, begin = terminal.StatusLine(interval=0.5), time.monotonic()

    def progress(done: int, so_far: Perplexity) -> None:
        rate = done / (time.monotonic() - begin)
        left = f"{(len(ids) - done) / rate:.0f} s left"
        status.show(
            lambda: f"{done}/{len(ids)} tokens, {rate:.0f} tok/s, {left}, perplexity {so_far.perplexity:.4f}"
        )

    try:
        result = measure(model, ids, window, progress)
    finally:
        status.clear()
    mean = result.nats / result.tokens
    if args.json:
        print(
            json.dumps(
                {
                    "perplexity": result.perplexity,
                    "nats_per_token": mean,
                    "tokens": result.tokens,
                    "window": window,
                }
            )
        )
    else:
        print(
            f"perplexity {result.perplexity:.4f} ({mean:.4f} nats per token) "
            f"over {result.tokens} tokens, windows of {window}"
        )
    return 0


def bench(args: argparse.Namespace) -> int:
    from .bench import quick

    for line in quick(_open_model(args)):
        print(line, flush=True)
    return 0


MODES = {
    "chat": chat, "generate": generate, "trace": trace, "info": info, "perplexity": perplexity, "bench": bench,
}  # fmt: skip


# ----------------------------------------------------------------------------
# What the modes share


def _open_model(args: argparse.Namespace, chats: bool = False) -> Model:
    renderer = None
    if chats:
        from .template import Renderer

        renderer = Renderer()
        renderer.start()  # beside all that follows, which takes longer

    from . import engine
    from .model import Model

    if args.isa:
        engine.set_isa(args.isa)
    return Model(args.model, args.threads, args.kv, args.activations, args.huge_pages, renderer=renderer)


def _context(args: argparse.Namespace, model: Model) -> int:
    from .memory import default_context

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
    from . import engine
    from .chat import may_think
    from .memory import gib

    config, kind = model.config, model.metadata["thinking"]
    switch = "thinking on" if thinking else "thinking off"
    thinking = may_think(kind, thinking)
    s = model.sampling(thinking, **_sampling(args))
    kv_bytes = context * config.kv_bytes_per_token(model.kv)
    isa = "--isa" if args.isa else "QWEN3C_ISA" if os.environ.get("QWEN3C_ISA") else "widest here"
    parts = [
        f"{model.metadata['name']} int8 g{config.group_size} {gib(model.file.file_size)}",
        "raw text" if raw else {"always": "always thinks", "none": "no thinking"}.get(kind, switch),
        f"temperature {s.temperature:g} top-p {s.top_p:g} top-k {s.top_k}",
        f"context {context} of {config.context} (KV {model.kv}: {gib(kv_bytes)} when full)",
        f"threads {model.threads}" + ("" if engine.OPENMP else " (built without OpenMP)"),
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


def _is_raw(args: argparse.Namespace) -> bool:
    """Whether the prompt is text to complete, not a message to reply to."""
    return (
        not args.chat_template and args.system is None and args.system_file is None and args.thinking is None
    )


def _prompt_tokens(args: argparse.Namespace, model: Model, text: str) -> list[int]:
    if _is_raw(args):
        return [*model.tokenizer.opening, *model.tokenizer.encode(text)]
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
    if args.mode is None:
        told = args.prompt is not None or args.file is not None
        args.mode = "info" if args.verify else "chat" if sys.stdin.isatty() and not told else "generate"
    paths = args.paths
    if args.mode == "perplexity":
        if args.file is None and paths:
            args.file = paths.pop()
        if args.file is None:
            parser.error("-m perplexity needs a text: run.py [MODEL] -m perplexity FILE")
    if len(paths) > 1:
        parser.error(f"one model at a time, not {len(paths)}: {' '.join(paths)}")
    args.model = paths[0] if paths else os.environ.get("QWEN3C_MODEL") or str(MODEL_IN_THE_BOX)
    if not paths and not os.path.exists(args.model):
        parser.error(f"which model? There is none at {args.model}")
    _check_combination(parser, args)
    return args


def _check_combination(parser: _Parser, args: argparse.Namespace) -> None:
    if args.verify and args.mode != "info":
        parser.error("--verify belongs to -m info")
    if (args.level or args.html) and args.mode != "trace":
        parser.error("--level and --html belong to -m trace")
    if args.mode == "chat" and (args.prompt is not None or args.file is not None):
        parser.error("-m chat takes its messages from stdin; -i and --file belong to -m generate")
    if args.echo and (args.mode != "generate" or args.json):
        parser.error("--echo belongs to -m generate, without --json")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs needs --json, where they are shown")
    if args.system is not None and args.system_file is not None:
        parser.error("--system and --system-file are two system prompts")


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
        prog="run.py",
        usage="run.py [MODEL] [-m chat|generate|trace|info|perplexity|bench] [options]",
        description="Run a model.bin: chat with it, complete text, look into it, measure it.",
        epilog="Without -m: chat on a terminal, generate if there is -i, --file or a pipe. "
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
    add("-i", "--prompt", metavar="TEXT", help="what to go on from; - is stdin, as is no -i at all")
    add("--file", metavar="FILE", help="read the prompt, or the text of perplexity, from a file; after -i")
    add("--chat-template", action="store_true", help="generate: the prompt is a message to reply to, not "
        "raw text to complete (implied by -y, -r, --think and --no-think)")  # fmt: skip
    add("--echo", action="store_true", help="generate: print the prompt before what follows it")
    add("-y", "--system", metavar="TEXT", help="system prompt (default: none)")
    add("--system-file", metavar="FILE", help="system prompt from a file")
    add("-r", "--reasoning", dest="thinking", type=_zero_or_one, metavar="0|1",
        help="thinking off or on (default: as the model does, which is on)")  # fmt: skip
    add("--think", dest="thinking", action="store_true", default=None, help="the same as -r 1")
    add("--no-think", dest="thinking", action="store_false", default=None, help="the same as -r 0")
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
    add("-j", "--threads", type=_at_least(1), metavar="N", help="default: what this machine can feed")
    add("--kv", choices=("int8", "f16", "f32"), default="f16",
        help="type of the KV cache: int8 takes half the memory of f16 (default: f16)")  # fmt: skip
    add("--activations", choices=("int8", "float32"), default="int8",
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
    from . import __version__

    return f"qwen3c {__version__}"
