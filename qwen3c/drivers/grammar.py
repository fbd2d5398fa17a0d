"""Grammars: JSON schemas, regular expressions, choices, Lark and tool calls as masks over tokens, by
llguidance.

    Grammar     compiled and checked once, before anything is computed
    its mask()  the state of one reply: which tokens may come next

What llguidance cannot enforce it refuses, and so does this module: a constraint is never dropped in
silence. A grammar begins after the thinking. The masks allow every token that keeps the text legal, so
that the model cuts the text into tokens as it is used to: llguidance's own choice of tokens, where only
one text can follow, is switched off.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..text.chat import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from ..text.tools import Tool, ToolSet
from .call_rules import CallRules, one_of
from .reply import Mask, Vocabulary
from .schema import GrammarError, Part, enforceable, named, parsed

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
Choice = Literal["auto", "required", "none"]

NEWLINES = 2  # that belong to </think>
MAX_LARK = 1 << 16  # characters
MAX_RULES = 1000  # definitions in a Lark grammar: llguidance follows them recursively
MAX_PATTERN = 1 << 13  # characters
MAX_CHOICES = 4096
MAX_OPERATORS = 64  # & and ~ in a Lark grammar
COMPILE_SECONDS = 10.0
COMPILING = 2  # grammars at once
STACK = 256 << 20  # bytes of address space for the thread that compiles
SENTENCE = 300  # characters of what llguidance says

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
ANY_OBJECT = {"type": "object"}


# ----------------------------------------------------------------------------
# Grammars


class Grammar:
    """What a reply's answer may be. Made by one of its class methods; vocabulary: that of the model.

    dropped: keywords of non-strict schemas that cannot be enforced and were left out, as "path.keyword".
    warnings: what llguidance says of a grammar that it accepts.
    GrammarError, one line, if it cannot be enforced or passes a limit. ImportError if llguidance is absent.
    """

    def __init__(self, vocabulary: Vocabulary, parts: list[Part], dropped: Sequence[str] = ()) -> None:
        """parts: llguidance's grammars, the first of which may name the others."""
        self.vocabulary = vocabulary
        self.parts = parts
        self.dropped = list(dropped)
        self._compiled = _Compiled(vocabulary, parts)
        self.warnings = self._compiled.warnings
        if any("oneOf" in warning for warning in self.warnings):
            self.dropped.append("oneOf")  # it holds as anyOf

    @classmethod
    def json_object(cls, vocabulary: Vocabulary) -> Grammar:
        """Any JSON object."""
        return cls.json_schema(vocabulary, ANY_OBJECT, strict=False)

    @classmethod
    def json_schema(cls, vocabulary: Vocabulary, schema: Any, strict: bool = True) -> Grammar:
        """JSON that a schema (a dict, or its text) allows. strict: refuse, not drop, what cannot be
        enforced.
        """
        checked, dropped = _enforced(vocabulary, schema, strict)
        return cls(
            vocabulary,
            [{"lark_grammar": f"start: @schema{NO_FORCING}"}, named("schema", checked, strict)],
            dropped,
        )

    @classmethod
    def regex(cls, vocabulary: Vocabulary, pattern: str) -> Grammar:
        """Text that `pattern`, in the syntax of Rust's regex, matches from its beginning to its end."""
        _check_text("regex", pattern, MAX_PATTERN)
        return cls(vocabulary, [{"lark_grammar": f"start: {_regex(pattern)}{NO_FORCING}"}])

    @classmethod
    def choice(cls, vocabulary: Vocabulary, texts: Sequence[str]) -> Grammar:
        """One of the texts."""
        if not isinstance(texts, (list, tuple)) or not 0 < len(texts) <= MAX_CHOICES:
            raise GrammarError(f"choice is not a list of 1 to {MAX_CHOICES} texts")
        for i, text in enumerate(texts):
            _check_text(f"choice[{i}]", text, MAX_PATTERN)
        # a lexeme: of alternatives in a rule llguidance follows no more than 2,000
        return cls(vocabulary, [{"lark_grammar": f"start: TEXT\nTEXT: {one_of(texts)}{NO_FORCING}"}])

    @classmethod
    def lark(cls, vocabulary: Vocabulary, text: str) -> Grammar:
        """A grammar in llguidance's variant of Lark."""
        _check_text("grammar", text, MAX_LARK)
        if len(re.findall(r"^[ \t]*[?!]?\w+[^\n:]*:", text, re.MULTILINE)) > MAX_RULES:
            raise GrammarError(f"grammar has more than {MAX_RULES} rules")
        if text.count("&") + text.count("~") > MAX_OPERATORS:
            raise GrammarError(f"grammar has more than {MAX_OPERATORS} & and ~")
        return cls(vocabulary, [{"lark_grammar": text + NO_FORCING}])

    @classmethod
    def tools(
        cls,
        vocabulary: Vocabulary,
        tools: ToolSet,
        choice: Choice = "auto",
        *,
        name: str | None = None,
        parallel: bool = True,
        answer: Grammar | None = None,
    ) -> Grammar:
        """Calls of tools, whose arguments their schemas allow.

        choice: "auto", text or calls; "required", calls alone; "none", text alone. name: a call of this
        tool alone, whatever the choice. parallel: whether more than one call may come. answer: with
        "auto", what an answer without calls has to be. A schema of a tool that is not strict loses what
        cannot be enforced (`dropped`).
        """
        if name is not None and name not in tools:
            raise GrammarError(f"tool_choice names {name[:64]!r}, which is not among the tools")
        begin, end = vocabulary.control_id(TOOL_CALL), vocabulary.control_id(END_TOOL_CALL)
        if choice == "none" and name is None:
            return _WithoutCalls(vocabulary, begin, answer)
        if begin is None or end is None:
            raise GrammarError(
                f"this model cannot be held to tool calls: it has no tokens {TOOL_CALL} and {END_TOOL_CALL}"
            )
        if not len(tools):
            raise GrammarError("tools is empty: there is nothing to call")
        called = list(tools) if name is None else [tools[name]]
        calls = CallRules(tools.format, functools.partial(_tool_schema, vocabulary))
        for tool in called:
            calls.add(tool)
        rules, parts, dropped = calls.lark(), calls.parts, calls.dropped
        body = f'"\\n" body "\\n" <[{end}]>'
        if choice == "auto" and name is None and answer is None:
            lark = f"start: {body}\n{rules}{NO_FORCING}"
            return _FreeUntilCall(vocabulary, [{"lark_grammar": lark}, *parts], dropped, begin, parallel)
        more = "" if name is not None or not parallel else ' ("\\n" call)*'
        start = "start: calls" + " | @answer" * (answer is not None)
        lark = f"{start}\ncalls: call{more}\ncall: <[{begin}]> {body}\n{rules}"
        if answer is not None:
            parts += _renamed(answer.parts, "answer")
        return cls(vocabulary, [{"lark_grammar": lark + NO_FORCING}, *parts], dropped)

    @classmethod
    def of(
        cls,
        vocabulary: Vocabulary,
        schema: Any = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        grammar: str | Grammar | None = None,
    ) -> Grammar | None:
        """The grammar that the one argument which is not None stands for; None if all are."""
        if isinstance(grammar, Grammar):
            if grammar.vocabulary is not vocabulary:
                raise GrammarError("grammar was made for another model")
            return grammar
        if schema is not None:
            return cls.json_schema(vocabulary, schema)
        if regex is not None:
            return cls.regex(vocabulary, regex)
        if choice is not None:
            return cls.choice(vocabulary, choice)
        return None if grammar is None else cls.lark(vocabulary, grammar)

    def mask(self, prompt: Sequence[int]) -> Mask:
        """The state of one reply, the one to `prompt` (token ids)."""
        return _AnswerMask(self.vocabulary, self._compiled, self.vocabulary.beginning(prompt))


class _FreeUntilCall(Grammar):
    """Text of any kind, in which a call, once begun, is one that the tools allow."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        parts: list[Part],
        dropped: list[str],
        begin: int,
        parallel: bool,
    ) -> None:
        super().__init__(vocabulary, parts, dropped)
        self._begin = begin
        self._parallel = parallel

    def mask(self, prompt: Sequence[int]) -> Mask:
        return _CallMask(self.vocabulary, self._compiled, self._begin, self._parallel)


class _WithoutCalls(Grammar):
    """Text of any kind without the token that begins a call, or what another grammar allows."""

    def __init__(self, vocabulary: Vocabulary, begin: int | None, answer: Grammar | None) -> None:
        self.vocabulary = vocabulary
        self.parts = []
        self.dropped = [] if answer is None else answer.dropped
        self.warnings = [] if answer is None else answer.warnings
        self._begin = begin
        self._answer = answer

    def mask(self, prompt: Sequence[int]) -> Mask:
        if self._answer is not None:
            return self._answer.mask(prompt)
        return _Without(self.vocabulary, [] if self._begin is None else [self._begin])


# ----------------------------------------------------------------------------
# The state of one reply


class _Compiled:
    """A grammar that any number of replies may go through.

    The matchers of one compilation share what their lexer has worked out, and the limit on that: a reply
    could fail for what others said. So a matcher that fails is made again, by a compilation of its own.
    """

    def __init__(self, vocabulary: Vocabulary, parts: list[Part]) -> None:
        self._vocabulary = vocabulary
        self._parts = parts
        self._first = _compiled(vocabulary, parts)
        self.warnings: list[str] = self._first.get_grammar_warnings()

    def matcher(self) -> LLMatcher:
        """At the beginning of the text."""
        return self._first.deep_copy()

    def matcher_after(self, tokens: list[int]) -> LLMatcher:
        """After `tokens`, of a new compilation, which others go on from."""
        self._first = _compiled(self._vocabulary, self._parts)
        matcher = self._first.deep_copy()
        matcher.consume_tokens(tokens)
        return matcher


class _Matched:
    """The place of one text in a grammar. Its masks are computed in another thread, if asked for in time."""

    def __init__(self, vocabulary: Vocabulary, compiled: _Compiled) -> None:
        assert vocabulary.tokenizer is not None
        self._n_tokens = vocabulary.n_tokens
        self._encode = vocabulary.tokenizer.encode
        self._compiled = compiled
        self._matcher = compiled.matcher()
        self._tokens: list[int] = []
        self._coming: Future[bytes] | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def prepare(self) -> None:
        if self._coming is None:
            try:
                self._coming = _worker().submit(self._compute)
            except (
                RuntimeError
            ):  # no thread to be had, or the interpreter is ending: then when it is asked for
                pass

    def forced(self) -> list[int]:
        """The text that alone can follow, in tokens as a model would cut it.

        The last of several is left out: what comes after the text may belong to it.
        """
        if self._coming is not None or self._matcher.is_stopped():
            return []
        text = self._matcher.compute_ff_bytes().decode(errors="ignore")
        tokens = self._encode(text) if text else []
        return tokens[: max(len(tokens) - 1, 1)]

    def allowed(self) -> NDArray[np.bool_]:
        """(n_tokens,), the caller's own."""
        coming, self._coming = self._coming, None
        bits = np.frombuffer(self._compute() if coming is None else coming.result(), np.uint8)
        return np.unpackbits(bits, count=self._n_tokens, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        if self._coming is not None:  # a matcher does one thing at a time
            self._coming.result()
            self._coming = None
        self._tokens.append(token)
        if not self._matcher.consume_token(token):
            self._matcher = self._compiled.matcher_after(self._tokens)
            if self._matcher.is_error():
                raise GrammarError(f"grammar: token {token} cannot follow here")

    def _compute(self) -> bytes:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._matcher = self._compiled.matcher_after(self._tokens)
            bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"grammar: too complex to go on: {_sentence(self._matcher.get_error())}")
        return bits


class _AnswerMask:
    """The mask of an answer that is held to a grammar, and of the thought before it.

    Thought is free but for what would end the reply in it: end tokens and other tags. Up to two newlines
    after </think>, which models write there, belong to the tag.
    """

    def __init__(
        self, vocabulary: Vocabulary, compiled: _Compiled, beginning: Literal["thought", "answer", "either"]
    ) -> None:
        self._matched = _Matched(vocabulary, compiled)
        self._vocabulary = vocabulary
        self._state = beginning
        self._newlines = 0  # how many may come before the answer

    def prepare(self) -> None:
        if self._state != "thought":
            self._matched.prepare()

    def forced(self) -> Sequence[int]:
        """See Mask."""
        return self._matched.forced() if self._state == "answer" and not self._newlines else ()

    def allowed(self) -> NDArray[np.bool_]:
        """See Mask."""
        if self._state == "thought":
            return _thought(self._vocabulary)
        allowed = self._matched.allowed()
        if self._state == "either":
            allowed[self._vocabulary.control_id(THINK)] = True
        for n, token in _newlines(self._vocabulary):
            if n <= self._newlines:
                allowed[token] = True
        return allowed

    def accept(self, token: int) -> None:
        """See Mask."""
        if self._state == "thought":
            if token == self._vocabulary.control_id(END_THINK):
                self._state, self._newlines = "answer", NEWLINES
            return
        if self._state == "either" and token == self._vocabulary.control_id(THINK):
            self._state = "thought"
            return
        self._state = "answer"
        n = next((n for n, newlines in _newlines(self._vocabulary) if newlines == token), NEWLINES + 1)
        if n <= self._newlines:
            self._newlines -= n
        else:
            self._newlines = 0
            self._matched.accept(token)


class _CallMask:
    """The mask of free text with calls in it. parallel: whether anything but an end may follow a call."""

    def __init__(self, vocabulary: Vocabulary, compiled: _Compiled, begin: int, parallel: bool) -> None:
        self._vocabulary = vocabulary
        self._compiled = compiled
        self._begin = begin
        self._parallel = parallel
        self._call: _Matched | None = None
        self._ended = False

    def prepare(self) -> None:
        if self._call is not None:
            self._call.prepare()

    def forced(self) -> Sequence[int]:
        """See Mask."""
        return () if self._call is None else self._call.forced()

    def allowed(self) -> NDArray[np.bool_] | None:
        """See Mask."""
        if self._ended:
            return _only(self._vocabulary, self._vocabulary.end_tokens)
        return None if self._call is None else self._call.allowed()

    def accept(self, token: int) -> None:
        """See Mask."""
        if self._call is not None:
            self._call.accept(token)
            if self._call.is_complete:
                self._call = None
                self._ended = not self._parallel
        elif token == self._begin:
            self._call = _Matched(self._vocabulary, self._compiled)


class _Without:
    """The mask that forbids the same tokens always."""

    def __init__(self, vocabulary: Vocabulary, forbidden: Sequence[int]) -> None:
        self._allowed = ~_only(vocabulary, forbidden) if forbidden else None

    def prepare(self) -> None:
        """There is nothing to compute."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """See Mask."""
        return self._allowed

    def accept(self, token: int) -> None:
        """Every token leaves it as it is."""


def _only(vocabulary: Vocabulary, tokens: Sequence[int] | frozenset[int]) -> NDArray[np.bool_]:
    mask = np.zeros(vocabulary.n_tokens, np.bool_)
    mask[list(tokens)] = True
    return mask


def _thought(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """What may come in a thought before an answer that is held to a grammar."""

    def mask() -> NDArray[np.bool_]:
        tags = [vocabulary.control_id(tag) for tag in (THINK, TOOL_CALL, END_TOOL_CALL)]
        forbidden = [*vocabulary.end_tokens, *(id for id in tags if id is not None)]
        allowed = ~_only(vocabulary, forbidden)
        allowed.setflags(write=False)
        return allowed

    return _derived(vocabulary, "thought", mask)


def _newlines(vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """(how many newlines, the token that stands for them) where there is one."""

    def found() -> list[tuple[int, int]]:
        assert vocabulary.tokenizer is not None
        cut = [(n, vocabulary.tokenizer.encode("\n" * n)) for n in range(1, NEWLINES + 1)]
        return [(n, ids[0]) for n, ids in cut if len(ids) == 1]

    return _derived(vocabulary, "newlines", found)


def _derived(vocabulary: Vocabulary, name: str, make: Callable[[], T]) -> T:
    """What is made of a vocabulary once. Two threads may both make it: they make the same."""
    if name not in vocabulary.derived:
        vocabulary.derived[name] = make()
    found: T = vocabulary.derived[name]
    return found


@functools.cache
def _worker() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # slow to import, as is logging with it

    return ThreadPoolExecutor(1, "qwen3c-masks")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_worker.cache_clear)  # the thread stays with the parent


# ----------------------------------------------------------------------------
# llguidance


def _tokens(vocabulary: Vocabulary) -> LLTokenizer:
    """llguidance's tokenizer of a vocabulary: half a second for a large one, once a model."""
    return _derived(vocabulary, "llguidance", lambda: _new_tokens(vocabulary))


def _new_tokens(vocabulary: Vocabulary) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError:
        raise ImportError(
            "schemas, grammars and tool choices need llguidance: `pip install 'qwen3c[serve]'` installs it"
        ) from None
    tokenizer, n_tokens, ends = vocabulary.tokenizer, vocabulary.n_tokens, sorted(vocabulary.end_tokens)
    if tokenizer is None or not tokenizer.byte_level:
        raise GrammarError("this model's vocabulary is not byte-level: it cannot be held to a grammar")
    if not ends:
        raise GrammarError("this model has no end token: it cannot be held to a grammar")
    tokens = [tokenizer.token_bytes(id) for id in range(n_tokens)]
    special = [id for id in range(n_tokens) if tokenizer.is_control(id)]
    bytes_alone = {token[0]: id for id, token in enumerate(tokens) if len(token) == 1}

    class Wrapped:
        """What llguidance asks of a tokenizer. It encodes only where tokens are
        forced, which they are not here.
        """

        eos_token_id, bos_token_id = ends[0], None
        special_token_ids = special

        def __call__(self, data: bytes | str) -> list[int]:
            data = data.encode() if isinstance(data, str) else data
            return [bytes_alone[byte] for byte in data if byte in bytes_alone]

    Wrapped.tokens = tokens  # type: ignore[attr-defined]
    return LLTokenizer(TokenizerWrapper(Wrapped()), n_vocab=n_tokens, eos_token=ends)


def _compiled(vocabulary: Vocabulary, parts: list[Part]) -> LLMatcher:
    """GrammarError if llguidance refuses."""
    tokens = _tokens(vocabulary)
    from llguidance import LLMatcher, LLParserLimits

    def compile() -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False)
        made = LLMatcher(tokens, json.dumps({"grammars": parts}), log_level=0, limits=limits)
        if not made.is_error():
            begun = made.deep_copy()
            begun.compute_bitmask()  # some faults show only at the first token: rules that never end
            if error := begun.get_error():
                raise GrammarError(f"grammar cannot be followed: {_sentence(error)}")
        return made

    matcher = _with_large_stack(compile)
    if matcher.is_error():
        raise GrammarError(_sentence(matcher.get_error()))
    ignored = [w for w in matcher.get_grammar_warnings() if w.startswith("Unimplemented")]
    if ignored:
        raise GrammarError(_sentence(ignored[0]))
    return matcher


_stack_size = threading.Lock()  # of the threads that start: a setting of the whole process
_compiling = threading.Semaphore(COMPILING)


def _with_large_stack(function: Callable[[], T]) -> T:
    """The result of `function`, run in a thread whose stack llguidance's recursion
    over a chain of rules fits in.

    GrammarError if it takes longer than COMPILE_SECONDS. Nothing can stop it then, but no more than
    COMPILING of its kind run at once.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again where it belongs
            errors.append(error)
        finally:
            _compiling.release()

    if not _compiling.acquire(timeout=COMPILE_SECONDS):
        raise GrammarError("other grammars are being compiled and take too long: try again later")
    thread = threading.Thread(target=run, name="qwen3c-grammar", daemon=True)
    with _stack_size:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        except RuntimeError:
            _compiling.release()
            size = f"{STACK >> 20} MiB of stack"
            raise MemoryError(f"no room for the {size} that a grammar is compiled with") from None
        finally:
            threading.stack_size(before)
    thread.join(COMPILE_SECONDS)
    if errors:
        raise errors[0]
    if not results:
        raise GrammarError(f"grammar is too complex: it takes longer than {COMPILE_SECONDS:g} s to compile")
    return results[0]


def _sentence(message: str) -> str:
    """What llguidance says, in one line."""
    text = " ".join(re.split(r"\n\s*<state>|<non-verbose/>", message)[0].split())
    return text if len(text) <= SENTENCE else text[: SENTENCE - 1] + "…"


# ----------------------------------------------------------------------------
# Pieces of grammars


def _check_text(name: str, text: Any, most: int) -> None:
    if not isinstance(text, str):
        raise GrammarError(f"{name} is {type(text).__name__}, not text")
    if len(text) > most:
        raise GrammarError(f"{name} has {len(text)} characters, at most {most} are accepted")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"{name} holds a lone surrogate at position {error.start}") from None


def _regex(pattern: str) -> str:
    """A pattern as Lark has it: between slashes, on one line."""
    escaped = re.sub(r"\\.|/|\n|\r", lambda found: _LARK.get(found[0], found[0]), pattern, flags=re.DOTALL)
    return f"/{escaped or '(?:)'}/"


_LARK = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}


def _renamed(parts: list[Part], name: str) -> list[Part]:
    """The parts under names that begin with `name`, the first under `name` itself."""
    names = {part["name"]: f"{name}_{part['name']}" for part in parts[1:]}
    renamed = [{**part, "name": names.get(part.get("name", ""), name)} for part in parts]
    for old, new in names.items():
        renamed[0]["lark_grammar"] = renamed[0]["lark_grammar"].replace(f"@{old}", f"@{new}")
    return renamed


# ----------------------------------------------------------------------------
# Schemas


def _enforced(vocabulary: Vocabulary, schema: Any, strict: bool) -> tuple[dict[str, Any], list[str]]:
    """(a schema, or what of it can be enforced if it is not strict, the places of what was dropped)."""

    def refusal(schema: dict[str, Any]) -> str | None:
        try:
            _compiled(vocabulary, [named("schema", schema, strict)])
        except GrammarError as error:
            return str(error)
        return None

    return enforceable(parsed(schema), None if strict else refusal)


def _tool_schema(
    vocabulary: Vocabulary, tool: Tool, schema: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """See _enforced; a refusal names the tool."""
    try:
        checked, dropped = _enforced(vocabulary, schema, tool.strict)
        _compiled(vocabulary, [named("schema", checked, tool.strict)])
        return checked, dropped
    except GrammarError as error:
        raise GrammarError(f"tool {tool.name}: {error}") from None
