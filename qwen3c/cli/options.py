"""What run.py is told: every option, the modes that use it, and which mode it is without -m."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any

from ..system.files import MODEL_IN_THE_BOX
from ..system.mistakes import hub_name
from .command import Parser, at_least, program_name

SCRIPT = "run.py"
SMALLER_CONTEXT = "a smaller context (-c) takes less"  # said when memory runs out
RAW_TOKENS = 256  # default -n of a completion, because bare text need not end by itself
TRACED_TOKENS = 24  # default -n of -m trace --html
WINDOW = 2048  # tokens of a perplexity window, or the model's context if that is shorter
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
COMPUTING = (*TALKING, "perplexity", "bench", "batch", "serve", "mcp")
MODES = (*TALKING, "info", "perplexity", "bench", "batch", "serve", "mcp", "models")
SERVING = (
    "host", "port", "fd", "config", "print_config", "api_keys", "max_gap", "cache_memory", "queue", "running",
    "cors_origin", "allowed_host", "drain", "log_json", "metrics", "model_alias", "idle_unload",
)  # fmt: skip
CLOUD_FIRST = ("chat", "serve")  # modes that may ask a provider before the model
# option -> the modes that use it; any other mode refuses it. --mode alone is every mode's
USED_BY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("prompt", "chat_template", "raw"), ("generate", "trace")),
    "file": ("generate", "trace", "perplexity"),
    **dict.fromkeys(("echo", "schema"), ("generate",)),
    **dict.fromkeys(
        ("system", "system_file", "reasoning", "think", "no_think", "max_tokens", "stop"), TALKING
    ),
    **dict.fromkeys((*SAMPLING, "logit_bias"), TALKING),
    "context": (*TALKING, "perplexity", "batch", "serve", "mcp"),
    **dict.fromkeys(("threads", "kv", "huge_pages", "isa"), COMPUTING),
    "activations": (*TALKING, "perplexity", "bench", "batch", "mcp"),
    **dict.fromkeys(("output", "concurrency", "max_memory"), ("batch",)),
    **dict.fromkeys(("draft", "drafts"), ("chat", "generate", "batch", "serve", "mcp")),
    **dict.fromkeys(SERVING, ("serve",)),
    **dict.fromkeys(("hide_thinking", "logprobs"), ("chat", "generate")),
    "json": (*TALKING, "info", "perplexity", "models"),
    "bits": (*TALKING, "info", "perplexity", "bench", "batch", "serve", "mcp"),
    **dict.fromkeys(("prune", "yes"), ("models",)),
    **dict.fromkeys(("level", "html"), ("trace",)),
    "verify": ("info",),
    "overflow": ("chat",),
    **dict.fromkeys(
        (
            "upstream",
            "upstream_model",
            "upstream_requests",
            "upstream_tokens",
            "upstream_state",
            "upstream_insecure",
            "upstream_env_proxy",
            "offline",
        ),
        CLOUD_FIRST,
    ),
    "mcp": ("chat", "serve"),
    "url": ("mcp",),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one of MODES, with the model's path and defaults; exits with an error if they are
    wrong.
    """
    parser = new_parser()
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
    args.given = frozenset(given)
    args.thinking = True if args.think else False if args.no_think else args.reasoning
    args.kv, args.activations = args.kv or "f16", args.activations or "int8"
    args.model = _model_path(parser, args)
    return args


def _is_given(action: argparse.Action, args: argparse.Namespace) -> bool:
    return action.dest in USED_BY and getattr(args, action.dest) is not action.default


def _mode_without_m(given: Collection[str]) -> str:
    """The only mode that uses one of the given options; else chat on a terminal; else generate.

    With a prompt the mode is never chat, where messages are typed.
    """
    has_prompt = not {"prompt", "file", "chat_template", "raw"}.isdisjoint(given)
    for mode, *others in map(USED_BY.__getitem__, given):
        if not others and not (mode == "chat" and has_prompt):
            return mode
    return "chat" if sys.stdin.isatty() and not has_prompt else "generate"


def _model_path(parser: Parser, args: argparse.Namespace) -> str:
    """The path of the model: the argument, else QWEN3C_MODEL, else the model in the box."""
    paths = args.paths
    if args.mode == "perplexity":
        if args.file is None and paths:
            args.file = paths.pop()
        if args.file is None:
            parser.error(f"-m perplexity needs a text: {parser.prog} [MODEL] -m perplexity FILE")
    if args.mode == "batch":
        if not paths or args.output is None:
            parser.error(
                f"-m batch needs both: {parser.prog} [MODEL] -m batch REQUESTS.jsonl -o ANSWERS.jsonl"
            )
        args.requests = paths.pop()
    for path in paths:
        if path in MODES and not os.path.exists(path):
            parser.error(f"{path}: No such file or directory; did you mean -m {path}?")
    if len(paths) > 1:
        parser.error(f"one model at a time, not {len(paths)}: {' '.join(paths)}")
    if args.mode in ("serve", "models"):
        return paths[0] if paths else ""  # a configuration may name models; all in the cache are meant
    model: str = paths[0] if paths else model_by_default()
    if not paths and not os.path.exists(model) and not hub_name(model):
        parser.error(f"which model? There is none at {model}")
    return model


def model_by_default() -> str:
    """The path of the model that is meant where none is named."""
    return os.environ.get("QWEN3C_MODEL") or str(MODEL_IN_THE_BOX)


def _check_combination(parser: Parser, args: argparse.Namespace) -> None:
    if args.mcp is not None and args.upstream is not None:
        parser.error("--mcp gives tools to the model here, --upstream asks a provider: use one of them")
    if args.echo and args.json:
        parser.error("--echo is for text; with --json the prompt is not shown")
    if args.hide_thinking and args.json:
        parser.error("--hide-thinking is for text; with --json thinking has a field of its own")
    if args.logprobs is not None and not args.json:
        parser.error("--logprobs needs --json, where they are shown")
    if args.system is not None and args.system_file is not None:
        parser.error("--system and --system-file are two system prompts")
    if (args.upstream is None) != (args.upstream_model is None):
        parser.error("--upstream URL and --upstream-model M belong together")
    limits = (args.upstream_requests, args.upstream_tokens, args.upstream_state)
    if args.upstream is None and any(limit is not None for limit in limits):
        parser.error("--upstream-requests, --upstream-tokens and --upstream-state limit an --upstream")
    if args.upstream is not None and args.logprobs is not None:
        parser.error("--logprobs are the model's own; a provider (--upstream) counts in other tokens")
    if args.raw and (args.system is not None or args.system_file is not None):
        parser.error("--raw completes text, which has no system prompt (-y, --system-file)")
    if args.raw and (args.think or args.no_think or args.reasoning is not None):
        parser.error("--raw completes text, which has no switch for thinking (-r, --think, --no-think)")
    if args.yes and not args.prune:
        parser.error("--yes is the answer to --prune")
    if args.url is not None and args.paths:
        parser.error("--url serves the model of a running server; another one cannot be named")


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


def new_parser() -> Parser:
    """The parser; its options are in the order of --help."""
    parser = Parser(
        SCRIPT,
        usage=f"{program_name(SCRIPT)} [MODEL] [-m {'|'.join(MODES)}] [options]",
        description="Run a model.bin: chat with it, complete text, look into it, measure it.",
        epilog="Without -m a model with a chat template chats on a terminal and answers what comes with -i, "
        "--file "
        "or a pipe; -m generate, --raw and a model without a template complete it as text, and "
        "--chat-template, -y, "
        "-r, --think and --no-think make -m generate answer too. "
        "Sampling that is not given comes from the model's generation_config, else from what its "
        "makers recommend (thinking: 0.6/0.95/20, not thinking: 0.7/0.8/20).",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="*",
        metavar="MODEL",
        help="file made by export.py, or the name of a model on the Hugging Face Hub, such as "
        "Qwen/Qwen3-0.6B, which is fetched and converted once (default: QWEN3C_MODEL, else the model in the "
        "box)",
    )
    add(
        "-m",
        "--mode",
        choices=MODES,
        help="chat; generate: one reply or completion; trace: look inside "
        "while a text flows through; info: what is in the file and the memory it takes; perplexity FILE: how "
        "well the model predicts a text; bench: how fast it runs here, beside what the machine can do; "
        "batch FILE -o FILE: answer a file of requests in the format of OpenAI's Batch API; "
        "serve: a chat page and OpenAI's API over HTTP; "
        "mcp: the model as tools of an MCP host, over stdin and stdout; "
        "models: the models of the Hub that are kept here, and what each needs",
    )
    add("--version", action="version", version=_version())
    _add_text(parser.add_argument_group("text"))
    _add_sampling(parser.add_argument_group("sampling"))
    _add_machine(parser.add_argument_group("machine"))
    _add_output(parser.add_argument_group("output"))
    _add_cloud(parser.add_argument_group("cloud first, the model if it does not answer"))
    _add_batch(parser.add_argument_group("batch"))
    _add_serving(parser.add_argument_group("serve"))
    _add_mcp(parser.add_argument_group("MCP"))
    _add_models(parser.add_argument_group("models by name"))
    return parser


def _add_text(group: Any) -> None:
    add = group.add_argument
    add("-i", "--prompt", metavar="TEXT", help="the prompt; - is stdin, as is no -i at all")
    add("--file", metavar="FILE", help="read the prompt, or the text of perplexity, from a file; after -i")
    kind = group.add_mutually_exclusive_group().add_argument
    kind("--chat-template", action="store_true", help="the prompt is a message to answer, also with -m "
        "generate "
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
        type=at_least(0),
        metavar="N",
        help=f"most tokens of a reply; 0: what the context holds (default: 0; raw text {RAW_TOKENS})",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="end the reply before TEXT; repeatable")
    add("--schema", metavar="FILE", help="generate: the answer is JSON that the JSON schema in FILE allows")


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
        type=at_least(0),
        metavar="N",
        help="positions; 0: the model's "
        "(default: 8192, or what the model and half of the free memory hold; perplexity: windows of 2048)",
    )
    add("--overflow", choices=("stop", "drop"), help="chat: what happens when the context is full: stop "
        "refuses "
        "the message (the default), drop lets the oldest turns go")  # fmt: skip
    add("-j", "--threads", type=at_least(1), metavar="N",
        help="default: QWEN3C_THREADS, else OMP_NUM_THREADS, else what this machine can feed")  # fmt: skip
    add("--kv", choices=("int8", "f16", "f32"),
        help="type of the KV cache: int8 takes half the memory of f16 (default: f16)")  # fmt: skip
    add("--activations", choices=("int8", "float32"),
        help="float32 is slow and for comparing with other programs (default: int8)")  # fmt: skip
    add("--huge-pages", action="store_true", help="copy the weights into memory of large pages: more "
        "bandwidth for "
        "a slower start and memory of their own")  # fmt: skip
    drafts = group.add_mutually_exclusive_group().add_argument
    drafts(
        "--draft",
        metavar="FILE",
        help="a smaller model.bin with the same tokenizer guesses at the next tokens: the same text, sooner",
    )
    drafts(
        "--no-draft",
        dest="drafts",
        action="store_false",
        help="a token a pass, without guesses at the next ones by what the text has said before",
    )
    add("--isa", metavar="NAME", help="instruction set (default: QWEN3C_ISA, else the widest here)")


def _add_output(group: Any) -> None:
    add = group.add_argument
    add("--hide-thinking", action="store_true", help="show the answer only")
    add("--json", action="store_true", help="one line of JSON per reply")
    add("--logprobs", type=at_least(0), metavar="N", help="with --json: log-probability of each token of "
        "the reply, and the N most likely ones beside it")  # fmt: skip
    add("--level", choices=("input_flow", "compact", "verbose"), help="trace: the modules and their shapes "
        "(the default); the range of every activation; also types, bytes, errors and every "
        "weight")  # fmt: skip
    add("--html", metavar="FILE", help="trace: write one page to look at: norms, attention, the predictions "
        "after each layer, and what else the next tokens might have been (-n, default "
        f"{TRACED_TOKENS})")  # fmt: skip
    add("--verify", action="store_true", help="info: read every tensor and compare its checksum")


def _add_cloud(group: Any) -> None:
    add = group.add_argument
    add(
        "--upstream",
        metavar="URL",
        help="ask a provider first: its URL without /chat/completions. Its key comes from "
        "QWEN3C_UPSTREAM_KEY or the systemd credential upstream-key",
    )
    add("--upstream-model", metavar="M", help="the model it is asked for")
    add("--upstream-requests", type=at_least(1), metavar="N", help="ask it at most N times a day")
    add("--upstream-tokens", type=at_least(1), metavar="N", help="spend at most about N tokens a day")
    add("--upstream-state", metavar="FILE", help="where what was spent today is kept, over restarts")
    add("--upstream-insecure", action="store_true", help="http:// to another machine, for all to read")
    add("--upstream-env-proxy", action="store_true", help="heed HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE")
    add("--offline", action="store_true", help="never ask the provider: no connection is opened")


def _add_batch(group: Any) -> None:
    add = group.add_argument
    add("-o", "--output", metavar="FILE", help="where the answers go; - is stdout. A run that was cut short "
        "leaves FILE.part, with which the same command goes on")  # fmt: skip
    add("--concurrency", type=at_least(1), metavar="N", help="sequences at once (default: 64)")
    add("--max-memory", metavar="SIZE", help='for keys and values of all sequences, such as "2 GiB" '
        "(default: a quarter of what is available)")  # fmt: skip


def _alias(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _add_serving(group: Any) -> None:
    add = group.add_argument
    add(
        "--host",
        metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1); any other address needs --api-keys",
    )
    add("--port", type=at_least(0), metavar="N", help="(default: 8080); 0: a free one")
    add(
        "--fd",
        type=at_least(0),
        metavar="N",
        help="listen on a socket that is open already, by its descriptor",
    )
    add("--config", metavar="FILE", help="settings as TOML; flags win over them")
    add("--print-config", action="store_true", help="print all settings as TOML, and serve nothing")
    add("--model-alias", action="append", default=[], type=_alias, metavar="NAME=PATH",
        help="one more model, loaded when a request names it; repeatable")  # fmt: skip
    add("--api-keys", metavar="FILE",
        help="only requests with a key of this file are answered; a line: NAME KEY "
        "[running=N] [queue=N] [priority=N]; SIGHUP reads it again")  # fmt: skip
    add("--max-gap", type=float, metavar="SECONDS",
        help="longest pause in a reply while prompts of others are read "
        "(default: 0.1 to 0.5, as the model allows)")  # fmt: skip
    add("--cache-memory", metavar="SIZE",
        help='for keys and values of requests and of what may be asked again, such as '
        '"2 GiB" (default: a quarter of what is available)')  # fmt: skip
    add("--running", type=at_least(1), metavar="N", help="sequences at once (default: 64)")
    add(
        "--queue",
        type=at_least(0),
        metavar="N",
        help="sequences that wait; the next one is refused (default: 128)",
    )
    add(
        "--idle-unload",
        type=float,
        metavar="SECONDS",
        help="release a model that nobody has asked for so long (default: never)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask; repeatable",
    )
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name this server has besides localhost; repeatable",
    )
    add(
        "--drain",
        type=float,
        metavar="SECONDS",
        help="what requests have to finish when the server is stopped (default: 5)",
    )
    add("--log-json", action="store_true", help="log lines as JSON")
    add(
        "--metrics",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="/metrics for Prometheus (default: yes)",
    )


def _add_mcp(group: Any) -> None:
    add = group.add_argument
    add(
        "--mcp",
        metavar="FILE",
        help="chat, serve: let the model call the tools of the MCP servers that FILE names under "
        "mcpServers; each call is asked about first",
    )
    add(
        "--url",
        metavar="URL",
        help="mcp: serve the tools of the server that runs there, which loads nothing here; "
        "QWEN3C_API_KEY is its key",
    )


def _add_models(group: Any) -> None:
    add = group.add_argument
    add(
        "--bits",
        metavar="N",
        help="how a model that is given by name is converted: 4, 4.5, 5, 6, 8 (default: 8)",
    )
    add("--prune", action="store_true", help="models: delete what no start needs, such as downloads of "
        "models that are converted; with MODEL all of that model")  # fmt: skip
    add("--yes", action="store_true", help="models: delete without asking")


def _version() -> str:
    from .. import __version__

    return f"qwen3c {__version__}"
