"""The prompt, from options, files and stdin: a system prompt, and a message or a text to complete."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..system import terminal

if TYPE_CHECKING:
    from ..model import Model


def system_prompt(args: argparse.Namespace) -> str | None:
    if args.system_file is not None:
        return read_text(args.system_file).removesuffix("\n")
    return None if args.system is None else _utf8(args.system, "--system")


def prompt_text(args: argparse.Namespace) -> str:
    """The texts of -i and --file, joined, or else stdin; one newline at the end of a file is dropped."""
    texts = []
    if args.prompt is not None and args.prompt != "-":
        texts.append(_utf8(args.prompt, "--prompt"))
    if args.file is not None or not texts:
        texts.append(read_text(args.file or "-").removesuffix("\n"))
    return "\n".join(texts)


def is_raw(args: argparse.Namespace, model: Model) -> bool:
    """Whether the prompt is text to complete, not a message to answer: the rule that --help states."""
    return not (_is_message(args) or (args.without_mode and not args.raw and model.file.template))


def _is_message(args: argparse.Namespace) -> bool:
    """Whether an option makes the prompt a message to answer."""
    given = (args.system, args.system_file, args.thinking)
    return bool(args.chat_template) or any(value is not None for value in given)


def may_chat(args: argparse.Namespace) -> bool:
    """Whether the chat template may be used; only the options are considered, not the model."""
    return _is_message(args) or (args.without_mode and not args.raw)


def prompt_tokens(args: argparse.Namespace, model: Model, text: str) -> list[int]:
    if is_raw(args, model):
        return [*model.tokenizer.opening, *model.tokenizer.encode(text)]
    if not text.strip():
        raise ValueError("prompt is empty: there is nothing to answer")
    system = system_prompt(args)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return model.chat_prompt([*messages, {"role": "user", "content": text}], args.thinking)


def read_text(path: str) -> str:
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
    """Refuse an argument that is not UTF-8: Python turns its bytes into lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start} is not UTF-8 text") from None
    return argument
