"""Conversations (JSONL) -> samples -> packed rows.

A sample is a conversation up to and with one reply of the assistant, rendered by the model's chat template,
thoughts and tool calls included, and tokenized as at run time. Only the reply's tokens and its end token are
learned. A part of a reply that the template would leave out is refused, never dropped. Lines of plain text
are learned whole; they keep the model able to continue text. A row holds several samples that do not see each
other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ..system import jsonl
from ..text.chat import ROLES, normalized
from . import TrainingError
from .checkpoint import fingerprint
from .next_token import IGNORED
from .vocabulary import TextEncoder, end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from .trainer import Batch

OPEN_ROWS = 32  # unfinished rows that a sample may be put into
BEYOND_TEXT = ("reasoning_content", "tool_calls")  # fields that a reply may have besides its text

Message = dict[str, Any]
Tools = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    tokens: list[int]
    prompt_length: int  # tokens before the reply; 0 for plain text


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not empty. TrainingError names a bad line."""
    try:
        yield from jsonl.objects(path)
    except OSError as error:
        raise TrainingError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise TrainingError(str(error)) from None


def check_messages(value: Any, where: str) -> list[Message]:
    """The messages, normalised by chat.normalized. TrainingError, naming `where`, if they are malformed."""
    if not isinstance(value, list) or not value:
        raise TrainingError(f"{where}: messages is not a list of messages")
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TrainingError(f"{where}: message {i} has no role")
        if message["role"] not in ROLES:
            expected = ", ".join(ROLES)
            raise TrainingError(
                f"{where}: message {i} has the role {message['role']!r}, not one of {expected}"
            )
        content = message.get("content")
        if content is None and not any(message.get(key) for key in BEYOND_TEXT):
            raise TrainingError(f"{where}: the content of message {i} is not text")
        if not isinstance(content, (str, list, type(None))):
            raise TrainingError(f"{where}: the content of message {i} is not text")
    try:
        return normalized(value)
    except ValueError as error:
        raise TrainingError(f"{where}: {error}") from None


def check_tools(value: Any, where: str) -> Tools | None:
    """The tools that the prompt lists; None if there are none. TrainingError if malformed."""
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise TrainingError(f"{where}: tools is not a list of objects")
    return value


class ConversationEncoder:
    """Messages -> tokens, by the tokenizer's chat template. TrainingError if it has none or refuses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise TrainingError("the model has no chat template: conversations cannot be rendered")
        self.tokenizer = tokenizer
        self.control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._plain = TextEncoder(tokenizer)

    def prompt(self, line: dict[str, Any], where: str) -> list[int]:
        """The conversation of a line of JSONL, up to where the assistant speaks."""
        messages, tools = self._conversation(line, where)
        return self._encode(self._render(messages, tools, where, prompts=True))

    def samples(self, line: dict[str, Any], where: str) -> Iterator[Sample]:
        """One sample per reply of a line of JSONL. TrainingError if there is no reply to learn."""
        messages, tools = self._conversation(line, where)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not replies:
            raise TrainingError(f"{where}: has no message of the assistant: there is nothing to learn")
        for i in replies:
            prompt, whole = self._prompt_and_whole(messages[: i + 1], tools, where)
            self._refuse_what_is_dropped(messages[: i + 1], tools, where)
            tokens = self._encode(prompt)
            reply = self._encode(whole[len(prompt) :])
            # text that the template puts behind the end token is not the assistant's
            end = self.tokenizer.eos_token_id
            yield Sample(tokens + reply[: reply.index(end) + 1 if end in reply else None], len(tokens))

    def text(self, text: Any, where: str) -> Sample:
        """Plain text and its end."""
        if not isinstance(text, str) or not text:
            raise TrainingError(f"{where}: text is not a text")
        self._refuse_control_tokens(text, f"{where}: text")
        return Sample([*self._plain.encode(text, where), end_of_text(self.tokenizer)], 0)

    def _conversation(self, line: dict[str, Any], where: str) -> tuple[list[Message], Tools | None]:
        messages, tools = check_messages(line.get("messages"), where), check_tools(line.get("tools"), where)
        for i, message in enumerate(messages):
            self._refuse_control_tokens(message, f"{where}: message {i}")
        self._refuse_control_tokens(tools, f"{where}: tools")
        return messages, tools

    def _prompt_and_whole(self, messages: list[Message], tools: Tools | None, where: str) -> tuple[str, str]:
        """(the rendered prompt of the last message, the rendered prompt with that message)."""
        # with a switch for thinking, a reply without thoughts matches the prompt with thinking off
        for thinking in (False, True):
            prompt = self._render(messages[:-1], tools, where, prompts=True, thinking=thinking)
            whole = self._render(messages, tools, where, thinking=thinking)
            if whole.startswith(prompt):
                return prompt, whole
        raise TrainingError(
            f"{where}: the chat template renders message {len(messages) - 1} otherwise than it prompts for it"
        )

    def _refuse_what_is_dropped(self, messages: list[Message], tools: Tools | None, where: str) -> None:
        """TrainingError if the template drops the last message's thoughts or calls, or the tools.

        It drops a part if rendering without the part gives the same text.
        """
        *before, reply = messages
        for key in BEYOND_TEXT:
            without = {name: value for name, value in reply.items() if name != key}
            if reply.get(key) and self._render_alike(messages, tools, [*before, without], tools):
                raise TrainingError(f"{where}: the chat template drops the {key} of message {len(before)}")
        if tools and self._render_alike(messages, tools, messages, None):
            raise TrainingError(f"{where}: the chat template drops the tools")

    def _render_alike(
        self, messages: list[Message], tools: Tools | None, others: list[Message], other_tools: Tools | None
    ) -> bool:
        try:
            return self._render(messages, tools, "") == self._render(others, other_tools, "")
        except TrainingError:  # the template fails without this part, so it does not drop it
            return False

    def _refuse_control_tokens(self, value: Any, where: str) -> None:
        """TrainingError if a text within a JSON value contains a control token."""
        if isinstance(value, str):
            for token in self.control:
                if token in value:
                    raise TrainingError(f"{where} holds the control token {token}")
        elif isinstance(value, dict):
            self._refuse_control_tokens([*value.keys(), *value.values()], where)
        elif isinstance(value, list):
            for item in value:
                self._refuse_control_tokens(item, where)

    def _render(
        self,
        messages: list[Message],
        tools: Tools | None,
        where: str,
        *,
        prompts: bool = False,
        thinking: bool = False,
    ) -> str:
        """The text that transformers renders. prompts: whether to add the generation prompt."""
        given: Any = tools
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=given, tokenize=False, add_generation_prompt=prompts, enable_thinking=thinking
            )
        except Exception as error:  # whatever the template raises
            raise TrainingError(
                f"{where}: the chat template refuses it: {' '.join(str(error).split())}"
            ) from None
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def read_samples(path: Path, tokenizer: PreTrainedTokenizerFast, context: int) -> tuple[list[Sample], int]:
    """(samples that fit the context, how many do not) of lines {"messages": [...]} or {"text": "..."}."""
    encoder = ConversationEncoder(tokenizer)
    samples, too_long = [], 0
    for number, value in read_jsonl(path):
        where = f"{path}: line {number}"
        if "text" in value and "messages" not in value:
            found = iter([encoder.text(value["text"], where)])
        else:
            found = encoder.samples(value, where)
        for sample in found:
            fits = len(sample.tokens) <= context
            too_long += not fits
            if fits:
                samples.append(sample)
    if not samples:
        raise TrainingError(f"{path}: all {too_long} samples are longer than the context of {context} tokens")
    return samples, too_long


def samples_fingerprint(samples: Sequence[Sample]) -> str:
    """The fingerprint of all tokens and of where each reply begins."""
    return fingerprint(np.array([s.prompt_length, *s.tokens], np.int32).tobytes() for s in samples)


class HasTokens(Protocol):
    @property
    def tokens(self) -> list[int]: ...


Item = TypeVar("Item", bound=HasTokens)


def split(samples: list[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(train, validation): the `fraction` whose tokens' hash with the seed is smallest, at least one."""
    if len(samples) < 2:
        raise TrainingError("one sample alone cannot be split: give --validation")
    ranked = sorted(samples, key=lambda s: hashlib.sha256(f"{seed} {s.tokens}".encode()).digest())
    cut = max(1, round(fraction * len(samples)))
    return ranked[cut:], ranked[:cut]


class Rows:
    """The endless sequence of packed rows: every epoch all samples, in a new order."""

    def __init__(self, samples: Sequence[Sample], context: int, seed: int) -> None:
        self.samples, self.context, self.seed = samples, context, seed
        self._epoch, self._first, self._rows = 0, 0, self._pack(0)

    @property
    def rows_per_epoch(self) -> int:
        """How many rows the first epoch has; others, in another order, may pack a little differently."""
        return len(self._pack(0))

    def __getitem__(self, index: int) -> list[Sample]:
        if index < self._first:
            self._epoch, self._first, self._rows = 0, 0, self._pack(0)
        while index >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._epoch += 1
            self._rows = self._pack(self._epoch)
        return self._rows[index - self._first]

    def _pack(self, epoch: int) -> list[list[Sample]]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))
        return pack([self.samples[i] for i in order], self.context)


def pack(samples: Sequence[Sample], context: int) -> list[list[Sample]]:
    """Rows of at most `context` tokens: first fit among the latest OPEN_ROWS rows."""
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        n = len(sample.tokens)
        row = next((i for i in range(max(0, len(rows) - OPEN_ROWS), len(rows)) if room[i] >= n), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(context)
        rows[row].append(sample)
        room[row] -= n
    return rows


def collate(rows: Sequence[Sequence[Sample]], context: int, padding: int) -> Batch:
    """tokens, positions, targets (n, context) int64; attention (n, 1, context, context), True where seen.

    The target of a token is the next one of its sample, if that belongs to the reply.
    """
    import torch

    n = len(rows)
    tokens = np.full((n, context), padding, np.int64)
    targets = np.full((n, context), IGNORED, np.int64)
    positions = np.zeros((n, context), np.int64)
    segments = np.zeros((n, context), np.int64)  # 0: padding
    for i, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, 1):
            end = start + len(sample.tokens)
            tokens[i, start:end] = sample.tokens
            positions[i, start:end] = np.arange(end - start)
            segments[i, start:end] = number
            first = max(sample.prompt_length, 1)
            targets[i, start + first - 1 : end - 1] = sample.tokens[first:]
            start = end
    same = segments[:, :, None] == segments[:, None, :]
    attention = (same & np.tril(np.ones((context, context), bool)))[:, None]
    arrays = {"tokens": tokens, "positions": positions, "targets": targets, "attention": attention}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
