"""Grammars: JSON schemas, regular expressions, choices, Lark and tool calls as masks over tokens, by llguidance.

    Grammar     compiled and checked once, before anything is computed
    its mask()  the state of one reply: which tokens may come next

What llguidance cannot enforce it refuses, and so does this module: a constraint is never dropped in silence.
A grammar begins after the thinking. The masks allow every token that keeps the text legal, so that the model cuts the
text into tokens as it is used to: llguidance's own choice of tokens, where only one text can follow, is switched off.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..text.chat import END_THINK, END_TOOL_CALL, THINK, TOOL_CALL
from ..text.tools import Tool, ToolSet
from .call_rules import CallRules, GrammarError, named, one_of
from .reply import Mask, Vocabulary

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
Choice = Literal["auto", "required", "none"]

MAX_SCHEMA = 1 << 18  # characters of JSON
MAX_LARK = 1 << 16  # characters
MAX_RULES = 1000  # definitions in a Lark grammar, references in a schema: llguidance follows them recursively
MAX_PATTERN = 1 << 13  # characters
MAX_CHOICES = 4096
STACK = 256 << 20  # bytes of address space for the thread that compiles
SENTENCE = 300  # characters of what llguidance says

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
ANY_OBJECT = {"type": "object"}

# keywords whose value is a schema, a list of schemas, or schemas by name
_ONE = ("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else",
        "unevaluatedItems", "unevaluatedProperties", "contentSchema")  # fmt: skip
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


# ----------------------------------------------------------------------------
# Grammars


class Grammar:
    """What a reply's answer may be. Made by one of its class methods; vocabulary: that of the model.

    dropped: keywords of non-strict schemas that cannot be enforced and were left out, as "path.keyword".
    warnings: what llguidance says of a grammar that it accepts.
    GrammarError, one line, if it cannot be enforced or passes a limit. ImportError if llguidance is absent.
    """

    def __init__(
        self, vocabulary: Vocabulary, parts: list[dict[str, Any]], dropped: Sequence[str] = ()
    ) -> None:
        """parts: llguidance's grammars, the first of which may name the others."""
        self.vocabulary = vocabulary
        self.parts = parts
        self.dropped = list(dropped)
        self._matcher = _compiled(vocabulary, parts)
        self.warnings: list[str] = self._matcher.get_grammar_warnings()

    @classmethod
    def json_object(cls, vocabulary: Vocabulary) -> Grammar:
        """Any JSON object."""
        return cls.json_schema(vocabulary, ANY_OBJECT)

    @classmethod
    def json_schema(cls, vocabulary: Vocabulary, schema: Any, strict: bool = True) -> Grammar:
        """JSON that a schema (a dict, or its text) allows. strict: refuse, not drop, what cannot be enforced."""
        checked, dropped = _enforceable(vocabulary, _parsed(schema), strict)
        return cls(
            vocabulary, [{"lark_grammar": f"start: @schema{NO_FORCING}"}, named("schema", checked)], dropped
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
        return cls(vocabulary, [{"lark_grammar": f"start: {one_of(texts)}{NO_FORCING}"}])

    @classmethod
    def lark(cls, vocabulary: Vocabulary, text: str) -> Grammar:
        """A grammar in llguidance's variant of Lark."""
        _check_text("grammar", text, MAX_LARK)
        if len(re.findall(r"^[ \t]*[?!]?\w+[^\n:]*:", text, re.MULTILINE)) > MAX_RULES:
            raise GrammarError(f"grammar has more than {MAX_RULES} rules")
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

        choice: "auto", text or calls; "required", calls alone; "none", text alone. name: a call of this tool alone,
        whatever the choice. parallel: whether more than one call may come. answer: with "auto", what an answer
        without calls has to be. A schema of a tool that is not strict loses what cannot be enforced (`dropped`).
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
        lark = f"start: calls{' | @answer' * (answer is not None)}\ncalls: call{more}\ncall: <[{begin}]> {body}\n{rules}"
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
        return _AnswerMask(self.vocabulary, self._matcher, self.vocabulary.beginning(prompt))


class _FreeUntilCall(Grammar):
    """Text of any kind, in which a call, once begun, is one that the tools allow."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        parts: list[dict[str, Any]],
        dropped: list[str],
        begin: int,
        parallel: bool,
    ) -> None:
        super().__init__(vocabulary, parts, dropped)
        self._begin = begin
        self._parallel = parallel

    def mask(self, prompt: Sequence[int]) -> Mask:
        return _CallMask(self.vocabulary, self._matcher, self._begin, self._parallel)


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


class _Matched:
    """A matcher whose masks are computed in another thread, if asked for in time."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._n_tokens = vocabulary.n_tokens
        self._matcher = matcher.deep_copy()
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

    def allowed(self) -> NDArray[np.bool_]:
        """(n_tokens,), the caller's own."""
        coming, self._coming = self._coming, None
        bits = np.frombuffer(self._compute() if coming is None else coming.result(), np.uint8)
        return np.unpackbits(bits, count=self._n_tokens, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        if self._coming is not None:  # a matcher does one thing at a time
            self._coming.result()
            self._coming = None
        if not self._matcher.consume_token(token):
            raise GrammarError(f"grammar: token {token} is not allowed here")

    def _compute(self) -> bytes:
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise GrammarError(f"grammar: too complex to go on: {_sentence(self._matcher.get_error())}")
        return bits


class _AnswerMask:
    """The mask of an answer that is held to a grammar, and of the thought before it.

    Thought is free but for what would end the reply in it: end tokens and other tags. The newline that models write
    after </think> belongs to the tag.
    """

    def __init__(
        self, vocabulary: Vocabulary, matcher: LLMatcher, beginning: Literal["thought", "answer", "either"]
    ) -> None:
        self._matched = _Matched(vocabulary, matcher)
        self._vocabulary = vocabulary
        self._state: Literal["thought", "answer", "either", "newline"] = beginning

    def prepare(self) -> None:
        if self._state != "thought":
            self._matched.prepare()

    def allowed(self) -> NDArray[np.bool_]:
        """See Mask."""
        if self._state == "thought":
            return _thought(self._vocabulary)
        allowed = self._matched.allowed()
        if self._state == "either":
            allowed[self._vocabulary.control_id(THINK)] = True
        elif self._state == "newline":
            allowed[_newlines(self._vocabulary)] = True
        return allowed

    def accept(self, token: int) -> None:
        """See Mask."""
        if self._state == "thought":
            self._state = "newline" if token == self._vocabulary.control_id(END_THINK) else "thought"
        elif self._state == "either" and token == self._vocabulary.control_id(THINK):
            self._state = "thought"
        elif self._state == "newline" and token in _newlines(self._vocabulary):
            self._state = "answer"
        else:
            self._state = "answer"
            self._matched.accept(token)


class _CallMask:
    """The mask of free text with calls in it. parallel: whether anything but an end may follow a call."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, begin: int, parallel: bool) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._begin = begin
        self._parallel = parallel
        self._call: _Matched | None = None
        self._ended = False

    def prepare(self) -> None:
        if self._call is not None:
            self._call.prepare()

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
            self._call = _Matched(self._vocabulary, self._matcher)


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


def _newlines(vocabulary: Vocabulary) -> list[int]:
    """The tokens of one newline, and of two."""

    def ids() -> list[int]:
        assert vocabulary.tokenizer is not None
        found = [vocabulary.tokenizer.encode(text) for text in ("\n", "\n\n")]
        return [ids[0] for ids in found if len(ids) == 1]

    return _derived(vocabulary, "newlines", ids)


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
        """What llguidance asks of a tokenizer. It encodes only where tokens are forced, which they are not here."""

        eos_token_id, bos_token_id = ends[0], None
        special_token_ids = special

        def __call__(self, data: bytes | str) -> list[int]:
            data = data.encode() if isinstance(data, str) else data
            return [bytes_alone[byte] for byte in data if byte in bytes_alone]

    Wrapped.tokens = tokens  # type: ignore[attr-defined]
    return LLTokenizer(TokenizerWrapper(Wrapped()), n_vocab=n_tokens, eos_token=ends)


def _compiled(vocabulary: Vocabulary, parts: list[dict[str, Any]]) -> LLMatcher:
    """GrammarError if llguidance refuses."""
    tokens = _tokens(vocabulary)
    from llguidance import LLMatcher, LLParserLimits

    def compile() -> LLMatcher:
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(tokens, json.dumps({"grammars": parts}), log_level=0, limits=limits)

    matcher = _with_large_stack(compile)
    if matcher.is_error():
        raise GrammarError(_sentence(matcher.get_error()))
    ignored = [w for w in matcher.get_grammar_warnings() if w.startswith("Unimplemented")]
    if ignored:
        raise GrammarError(_sentence(ignored[0]))
    return matcher


_stack_size = threading.Lock()  # of the threads that start: a setting of the whole process


def _with_large_stack(function: Callable[[], T]) -> T:
    """The result of `function`, run in a thread whose stack llguidance's recursion over a chain of rules fits in."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again where it belongs
            errors.append(error)

    thread = threading.Thread(target=run, name="qwen3c-grammar")
    with _stack_size:
        before = threading.stack_size(STACK)
        try:
            thread.start()
        except RuntimeError:
            raise MemoryError(
                f"no room for the {STACK >> 20} MiB of stack that a grammar is compiled in"
            ) from None
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _sentence(message: str) -> str:
    """What llguidance says, in one line."""
    text = " ".join(re.split(r"\n\s*<state>", message)[0].split())
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


def _renamed(parts: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The parts under names that begin with `name`, the first under `name` itself."""
    names = {part["name"]: f"{name}_{part['name']}" for part in parts[1:]}
    renamed = [{**part, "name": names.get(part.get("name", ""), name)} for part in parts]
    for old, new in names.items():
        renamed[0]["lark_grammar"] = renamed[0]["lark_grammar"].replace(f"@{old}", f"@{new}")
    return renamed


# ----------------------------------------------------------------------------
# Schemas


def _tool_schema(
    vocabulary: Vocabulary, tool: Tool, schema: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What can be enforced of a schema of a tool's, and what was dropped."""
    try:
        return _enforceable(vocabulary, _parsed(schema), tool.strict)
    except GrammarError as error:
        raise GrammarError(f"tool {tool.name}: {error}") from None


def _parsed(schema: Any) -> dict[str, Any]:
    """A schema as plain JSON, within the limits."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
        found = json.loads(text, parse_constant=_no_number)
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(f"schema is not JSON: {_sentence(str(error))}") from None
    if found is True:
        found = {}
    if not isinstance(found, dict):
        raise GrammarError(f"schema is {text[:40]}, not an object")
    if len(text) > MAX_SCHEMA:
        raise GrammarError(f"schema has {len(text)} characters, at most {MAX_SCHEMA} are accepted")
    if text.count('"$ref"') + text.count('"$dynamicRef"') > MAX_RULES:
        raise GrammarError(f"schema has more than {MAX_RULES} references")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _enforceable(
    vocabulary: Vocabulary, schema: dict[str, Any], strict: bool
) -> tuple[dict[str, Any], list[str]]:
    """(the schema, or what is left of it when it is not strict, the places of what was dropped)."""
    dropped: list[str] = []
    if "x-guidance" in schema:
        if strict:
            raise GrammarError("schema: x-guidance is not accepted")
        schema = {name: value for name, value in schema.items() if name != "x-guidance"}
        dropped.append("x-guidance")
    if strict:
        return schema, dropped
    while (refused := _refusal(vocabulary, schema)) is not None:
        if refused.startswith("recursion limit"):  # there is no way down to a keyword
            raise GrammarError(refused)
        culprit = next((c for c in _subschemas(schema) if _isnamed(vocabulary, refused, c)), None)
        if culprit is None:
            raise GrammarError(refused)
        place, holder, keyword = culprit
        dropped.append(place)
        del holder[keyword]
    return schema, dropped


def _refusal(vocabulary: Vocabulary, schema: dict[str, Any]) -> str | None:
    """What llguidance says against a schema; None if it takes it."""
    try:
        _compiled(vocabulary, [named("schema", schema)])
    except GrammarError as error:
        return str(error)
    return None


def _isnamed(vocabulary: Vocabulary, refused: str, culprit: tuple[str, dict[str, Any], str]) -> bool:
    """Whether a refusal is about a keyword, (its place, the schema it is in, its name)."""
    _, holder, keyword = culprit
    if refused.startswith("Unimplemented keys"):
        return json.dumps(keyword) in refused
    if refused.startswith("Unknown format"):
        return keyword == "format" and refused.endswith(f": {holder['format']}")
    if refused.startswith(("Resource ", "Pointer ", "Failed to resolve")):
        return keyword == "$ref" and not _is_local(holder["$ref"])
    if keyword in ("pattern", "patternProperties"):
        patterns = [holder[keyword]] if keyword == "pattern" else list(holder[keyword])
        alone = ({"type": "string", "pattern": pattern} for pattern in patterns)
        return any(_refusal(vocabulary, each) is not None for each in alone)
    return False


def _is_local(reference: Any) -> bool:
    return isinstance(reference, str) and reference.startswith("#")


def _subschemas(schema: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any], str]]:
    """Every keyword within a schema: (its place, the schema it is in, its name). Names of properties are none."""
    if not isinstance(schema, dict):
        return
    for keyword, value in list(schema.items()):
        place = f"{where}.{keyword}".lstrip(".")
        yield place, schema, keyword
        if keyword in _NAMED and isinstance(value, dict):
            for name, each in value.items():
                yield from _subschemas(each, f"{place}.{name}")
        if keyword in _LISTS and isinstance(value, list):
            for i, each in enumerate(value):
                yield from _subschemas(each, f"{place}[{i}]")
        if keyword in _ONE:
            yield from _subschemas(value, place)
