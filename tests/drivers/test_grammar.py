"""An answer that is held to a grammar meets it, whatever the model would rather say,
and nothing else of it changes.

python -m pytest tests/drivers/test_grammar.py
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import TINY_QWEN3, export_small_model, tokenizer_json

from qwen3c import MODEL_IN_THE_BOX, Event, Model
from qwen3c.drivers import grammar as grammars
from qwen3c.drivers.batch import drive
from qwen3c.drivers.grammar import Grammar
from qwen3c.drivers.reply import Mask, Reply, ReplySettings, ReplyState, Vocabulary
from qwen3c.drivers.sampler import Sampling
from qwen3c.drivers.schema import MAX_MEETING, MAX_SCHEMA, GrammarError
from qwen3c.text.tokenizer import Tokenizer
from qwen3c.text.tools import ToolSet

TOKENIZER = Tokenizer(tokenizer_json().encode())
END = TOKENIZER.control_id("<|im_end|>")
assert END is not None
USER = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
CLOSED = USER + "<think>\n\n</think>\n\n"


def vocabulary(thinking: str = "hybrid") -> Vocabulary:
    assert END is not None
    return Vocabulary(TOKENIZER.n_defined, frozenset({END}), (), TOKENIZER, thinking)


HYBRID = vocabulary()


@pytest.fixture(scope="module")
def box() -> Model:
    return Model(str(MODEL_IN_THE_BOX), threads=1)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return Model(str(TINY_QWEN3), threads=1)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random weights, tokens of any kind nearly equally likely, thinking and tool tags among them."""
    return Model(str(export_small_model(tmp_path_factory.mktemp("flat"), std=0.05)), threads=1)


# ----------------------------------------------------------------------------
# A model that says what a test wants, as far as it may


def wanting(token: int) -> NDArray[np.float32]:
    """Logits of a model that wants to say `token`, and second to that to end."""
    logits = np.zeros(TOKENIZER.n_defined, np.float32)
    logits[END], logits[token] = 5, 10
    return logits


def state(grammar: Grammar | None, prompt: str = "x", of: Vocabulary = HYBRID, **options: Any) -> ReplyState:
    ids = TOKENIZER.encode(prompt, special=True)
    mask = grammar.mask(ids) if grammar else None
    return ReplyState(of, ids, Sampling(temperature=0), 1000, ReplySettings(mask=mask, **options))


def said(state: ReplyState, text: str) -> str:
    """What a model that wants to say `text` and then to end says; "…" follows where it was not let."""
    tokens = [*TOKENIZER.encode(text, special=True), END]
    out: list[int] = []
    for wanted in tokens:
        assert wanted is not None
        state.prepare()
        event = state.take(wanting(wanted))
        if event.token != wanted:
            return TOKENIZER.decode(out) + "…"
        out.append(event.token)
    assert state.finish_reason == "stop"
    return TOKENIZER.decode(out[:-1])


def may_say(grammar: Grammar, text: str, prompt: str = "x") -> bool:
    return said(state(grammar, prompt), text) == text


# ----------------------------------------------------------------------------
# What a grammar allows


OBJECT = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (lambda: Grammar.json_object(HYBRID), ["{}", '{"a": [1, {"b": null}]}', '{\n  "a": "é🎉"\n}'],
         ["", "[]", "{", "{}{}", '"a"', " {}", "{,}", "hi {}"]),
        (lambda: Grammar.json_schema(HYBRID, OBJECT), ['{"name": "x"}', '{"name":"","n":-5}'],
         ["{}", '{"n": 5}', '{"name": 5}', '{"name": "x", "n": 1.5}', '{"name": "x", "z": 1}']),
        (lambda: Grammar.json_schema(HYBRID, json.dumps(OBJECT)), ['{"name": "x"}'], ["{}"]),
        (lambda: Grammar.json_schema(HYBRID, True), ["1", "null", '["a"]'], ["x"]),
        (lambda: Grammar.regex(HYBRID, r"\d{3}-(a|b)+/\n"), ["123-ab/\n"], ["12-a/\n", "123-", "123-a/\n\n"]),
        (lambda: Grammar.regex(HYBRID, "a/b\n\\/\"'"), ["a/b\n/\"'"], ["a/b"]),
        (lambda: Grammar.regex(HYBRID, ""), [""], ["a"]),
        (lambda: Grammar.choice(HYBRID, ["yes", "yes, indeed", "né🎉", 'q"\\\n\x00\t']),
         ["yes", "yes, indeed", "né🎉", 'q"\\\n\x00\t'], ["", "no", "yes,", "yesyes"]),
        (lambda: Grammar.lark(HYBRID, 'start: (DIGIT "+")* DIGIT\nDIGIT: /[0-9]/'), ["1", "1+2+3"], ["", "1+", "12"]),
        (lambda: Grammar.lark(HYBRID, 'start: %json {"enum": [1, 2]}'), ["1", "2"], ["3"]),
    ],
)  # fmt: skip
def test_a_grammar_allows_what_it_says(
    grammar: Callable[[], Grammar], good: list[str], bad: list[str]
) -> None:
    compiled = grammar()
    assert [text for text in good if not may_say(compiled, text)] == []
    assert [text for text in bad if may_say(compiled, text)] == []


def test_every_way_to_cut_the_text_into_tokens_is_allowed() -> None:
    """And not only the one that llguidance would choose where only one text can follow."""
    text = max(
        (TOKENIZER.decode([id]) for id in range(HYBRID.n_tokens) if not TOKENIZER.is_control(id)), key=len
    )
    allowed = Grammar.choice(HYBRID, [text]).mask([]).allowed()
    assert allowed is not None
    expected = {id for id in range(HYBRID.n_tokens) if text.encode().startswith(TOKENIZER.token_bytes(id))}
    assert set(np.flatnonzero(allowed)) == expected and len(expected) > 2


def test_nothing_but_an_end_token_follows_a_complete_answer() -> None:
    mask = Grammar.choice(HYBRID, ["a"]).mask([])
    mask.accept(TOKENIZER.encode("a")[0])
    allowed = mask.allowed()
    assert allowed is not None and np.flatnonzero(allowed).tolist() == [END]


def test_the_text_of_a_control_token_is_not_the_token() -> None:
    assert may_say(Grammar.regex(HYBRID, "<think>"), "<think>", CLOSED) is False
    mask = Grammar.regex(HYBRID, "<think>").mask(TOKENIZER.encode(CLOSED, special=True))
    for id in TOKENIZER.encode("<think>"):
        allowed = mask.allowed()
        assert allowed is not None and allowed[id] and not allowed[TOKENIZER.control_id("<think>")]
        mask.accept(id)


# ----------------------------------------------------------------------------
# What is refused


REFUSED: list[tuple[Any, str]] = [
    ({"type": "string", "format": "zzz"}, "Unknown format: zzz"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"not": {}}, r'Unimplemented keys: \["not"\]'),
    ({"if": {}, "then": {}}, "Unimplemented keys"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"$ref": "http://a/b"}, "Resource 'http://a/b' is not present"),
    ({"$ref": "#/$defs/a"}, "does not exist"),
    ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "oneOf"),
    ({"type": "zzz"}, "Invalid type: zzz"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
    ({"enum": []}, "Unsatisfiable"),
    ({"properties": []}, "properties must be an object"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance is not accepted"),
    (False, "schema is false, not an object"),
    ([1], r"schema is \[1\], not an object"),
    ("{", "schema is not JSON"),
    ("NaN", "NaN is no number of JSON"),
    ({"minimum": float("nan")}, "schema is not JSON"),
    ({"a": {1, 2}}, "schema is not JSON"),
    ({"description": "x" * MAX_SCHEMA}, f"at most {MAX_SCHEMA} are accepted"),
    ('{"items":' * 500 + "{}" + "}" * 500, "recursion limit exceeded"),
    ('{"items":' * 20000 + "{}" + "}" * 20000, "recursion"),
    ({"$defs": {f"a{i}": {"$ref": "#"} for i in range(1001)}}, "more than 1000 references"),
    (
        {"$ref": "#/$defs/a0", "$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(300)}},
        "follow each other",
    ),
    ({"allOf": [{"pattern": f"x{i}"} for i in range(MAX_MEETING + 1)]}, "patterns have to be met at once"),
]


@pytest.mark.parametrize(("schema", "complaint"), REFUSED, ids=range(len(REFUSED)))
def test_a_schema_that_cannot_be_enforced_is_refused_in_one_line(schema: Any, complaint: str) -> None:
    with pytest.raises(GrammarError, match=complaint) as error:
        Grammar.json_schema(HYBRID, schema)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Grammar.regex(HYBRID, "("), "regex parse error"),
        (lambda: Grammar.regex(HYBRID, "a" * 9000), "regex has 9000 characters, at most 8192"),
        (lambda: Grammar.regex(HYBRID, "\ud800"), "lone surrogate at position 0"),
        (lambda: Grammar.regex(HYBRID, 5), "regex is int, not text"),  # type: ignore[arg-type]
        (lambda: Grammar.regex(HYBRID, "(" * 2000 + ")" * 2000), "regex"),
        (lambda: Grammar.choice(HYBRID, []), "choice is not a list of 1 to 4096 texts"),
        (lambda: Grammar.choice(HYBRID, "ab"), "choice is not a list"),
        (lambda: Grammar.choice(HYBRID, ["a", 5]), r"choice\[1\] is int"),  # type: ignore[list-item]
        (lambda: Grammar.lark(HYBRID, "start: nothing"), "nothing"),
        (lambda: Grammar.lark(HYBRID, "start: " + "(" * 5000), "too deeply nested"),
        (lambda: Grammar.lark(HYBRID, "\n".join(f"a{i}: a{i + 1}" for i in range(1001))), "more than 1000 rules"),
        (lambda: Grammar.lark(HYBRID, "start: A\nA: /a/" + " & /a/" * 65), "more than 64 & and ~"),
        (lambda: Grammar.lark(HYBRID, 'start: %json {"not": {}, "x-guidance": {"lenient": true}}'), "Unimplemented"),
    ],
)  # fmt: skip
def test_grammars_of_other_kinds_are_refused_in_one_line(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(GrammarError, match=complaint) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_chain_of_rules_does_not_end_the_process() -> None:
    """llguidance follows it recursively; the stack of an ordinary thread ends at a few thousand."""
    rules = "\n".join(f"a{i}: {'(' * 10}a{i + 1} 'x'{')?' * 10}".replace("'", '"') for i in range(990))
    grammar = Grammar.lark(HYBRID, f'start: a0\n{rules}\na990: "a"')
    assert grammar.mask([]).allowed() is not None


def test_what_takes_too_long_to_compile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(grammars, "_compiling", threading.Semaphore(1))
    ends = threading.Event()
    with pytest.raises(GrammarError, match=r"longer than 0\.05 s to compile"):
        grammars._with_large_stack(ends.wait)
    with pytest.raises(GrammarError, match="other grammars are being compiled"):
        grammars._with_large_stack(lambda: 1)
    ends.set()
    while grammars._compiling._value == 0:
        time.sleep(0.001)
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 10)
    assert grammars._with_large_stack(lambda: 1) == 1
    with pytest.raises(ZeroDivisionError):
        grammars._with_large_stack(lambda: 1 // 0)


def until_too_complex(mask: Mask, seed: int) -> tuple[list[int], str]:
    """Random tokens that a mask allows, until it fails, and what it says then."""
    r, tokens = random.Random(seed), list[int]()
    try:
        while len(tokens) < 600:
            allowed = mask.allowed()
            assert allowed is not None
            tokens.append(int(r.choice(np.flatnonzero(allowed[:4000]))))
            mask.accept(tokens[-1])
    except GrammarError as error:
        return tokens, str(error)
    return tokens, ""


def longest_gap(grammar: Grammar, seed: int) -> int:
    """Blanks in a row that a model says which says a blank wherever it may, and else anything."""
    r, mask, text = random.Random(seed), grammar.mask([1]), ""
    blanks = [id for blank in " \n\t\r" for id in TOKENIZER.encode(blank)]
    while len(text) < 200:
        allowed = mask.allowed()
        assert allowed is not None
        wanted = [id for id in blanks if allowed[id]] or np.flatnonzero(allowed).tolist()
        token = r.choice(wanted)
        if token == END:
            break
        text += TOKENIZER.decode([token])
        mask.accept(token)
    assert text.count(",") + text.count(":") + text.count("]") > 1, text
    return max(map(len, re.findall(r"\s*", text)))


NUMBERS = {"type": "object", "properties": {"n": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 9}}}


def test_a_model_that_loves_blanks_gets_few_of_them() -> None:
    closed = NUMBERS | {"required": ["n"], "additionalProperties": False}
    strict, loose = (Grammar.json_schema(HYBRID, closed, strict) for strict in (True, False))
    assert [longest_gap(strict, seed) for seed in range(5)] == [1] * 5
    assert 2 <= max(longest_gap(loose, seed) for seed in range(20)) <= 22
    assert not may_say(strict, '{"n":  [0]}') and may_say(strict, '{"n": [0, 1]}')
    assert may_say(Grammar.json_object(HYBRID), '{\n    "n": [\n\n        0\n    ]\n}')
    assert not may_say(Grammar.json_object(HYBRID), '{\n\n\n"n": 0}')


def test_a_grammar_that_becomes_too_complex_fails_its_own_replies_alone(tiny: Model) -> None:
    """What one reply has made llguidance work out counts against the limits of no other."""

    def new() -> Grammar:
        return Grammar.regex(tiny.vocabulary, r"(\w+\s?){1,1000}")

    alone = [until_too_complex(new().mask([1]), seed) for seed in range(2)]
    assert all(re.match(r"grammar: too complex to go on: .*$", said) for _, said in alone)
    shared = new()
    assert [until_too_complex(shared.mask([1]), seed) for seed in range(2)] == alone


def test_a_vocabulary_that_cannot_be_held_to_a_grammar_says_so() -> None:
    from tokenizers import Tokenizer as Library, models

    words = Tokenizer(Library(models.WordLevel({"a": 0, "b": 1}, "a")).to_str().encode())
    for of, complaint in [
        (Vocabulary(2, frozenset({1}), (), words), "not byte-level"),
        (Vocabulary(2, frozenset({1})), "not byte-level"),
        (Vocabulary(TOKENIZER.n_defined, frozenset(), (), TOKENIZER), "no end token"),
    ]:
        with pytest.raises(GrammarError, match=complaint):
            Grammar.json_object(of)


def test_a_missing_llguidance_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"need llguidance: `pip install 'qwen3c\[serve\]'` installs it$"):
        Grammar.json_object(vocabulary())


def test_a_schema_that_is_not_strict_loses_what_cannot_be_enforced_and_says_what() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "format": "zzz"},
            "format": {"type": "string", "pattern": "(?=x)y"},
            "b": {
                "type": "array",
                "items": {"not": {"type": "null"}, "type": "integer"},
                "uniqueItems": True,
            },
            "c": {"$ref": "http://a/b"},
            "d": {"type": "string", "format": "date", "pattern": "^2"},
        },
        "required": ["a", "b", "d"],
        "if": {},
        "x-guidance": {"lenient": True},
    }
    grammar = Grammar.json_schema(HYBRID, schema, strict=False)
    assert sorted(grammar.dropped) == [
        "if",
        "properties.a.format",
        "properties.b.items.not",
        "properties.b.uniqueItems",
        "properties.c.$ref",
        "properties.format.pattern",
        "x-guidance",
    ]
    assert "if" in schema  # the caller's own is as it was
    assert may_say(grammar, '{"a": "", "b": [1, 1], "d": "2026-01-01"}')
    assert not may_say(grammar, '{"a": "", "b": ["1"], "d": "2026-01-01"}')
    assert not may_say(grammar, '{"a": "", "b": [1], "d": "1999-01-01"}')
    overlapping = Grammar.json_schema(HYBRID, {"oneOf": [{"type": "string"}, {"minLength": 1}]}, strict=False)
    assert overlapping.dropped == ["oneOf"] and "oneOf" in overlapping.warnings[0]
    with pytest.raises(GrammarError, match="Invalid type"):
        Grammar.json_schema(HYBRID, {"type": "zzz"}, strict=False)


# ----------------------------------------------------------------------------
# Whatever a model says meets its schema


def some_schema(r: random.Random, depth: int = 0) -> dict[str, Any]:
    """A random schema whose answers are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "anyOf"]
    kind = r.choice([*kinds, *["object", "object", "array"] * (depth < 3)]) if depth else "object"
    if kind == "string":
        return {"type": "string", "minLength": r.randrange(3), "maxLength": r.randrange(3, 9)}
    if kind == "integer":
        low = r.randrange(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + r.randrange(1, 200)}
    if kind == "number":
        return {"type": "number", "minimum": -5, "exclusiveMaximum": r.choice([0, 1.5, 100])}
    if kind == "enum":
        return {"enum": r.sample(["a", "bb", 1, 2.5, None, True, "é🎉", 'q"', ""], r.randrange(1, 5))}
    if kind == "const":
        return {"const": r.choice(["x", 5, [1, "a"], {"k": None}])}
    if kind == "pattern":
        return {"type": "string", "pattern": r.choice(["^[a-c]{2,4}$", r"^\d{1,3}-x?$", "^(ab|c)+d{1,2}$"])}
    if kind == "format":
        return {"type": "string", "format": r.choice(["date", "ipv4", "uuid", "time"])}
    if kind == "anyOf":
        return {"anyOf": [some_schema(r, depth + 1) for _ in range(r.randrange(1, 4))]}
    if kind == "array":
        return {
            "type": "array",
            "items": some_schema(r, depth + 1),
            "minItems": r.randrange(2),
            "maxItems": 3,
        }
    if kind == "object":
        names = r.sample(["name", "a", "b c", "ü", "n", 'q"'], r.randrange(1, 4))
        return {
            "type": "object",
            "properties": {name: some_schema(r, depth + 1) for name in names},
            "required": [name for name in names if r.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def meets(schema: Any, text: str) -> bool:
    try:
        jsonschema.validate(
            json.loads(text), schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def asked(model: Model) -> list[int]:
    return model.tokenizer.encode("def f(x):\n")


@pytest.mark.parametrize("which", ["box", "tiny", "flat"])
def test_replies_of_models_that_know_no_json_meet_random_schemas(
    which: str, request: pytest.FixtureRequest
) -> None:
    model: Model = request.getfixturevalue(which)
    r, stopped, n = random.Random(which), 0, 16
    for i in range(n):
        schema = some_schema(r)
        sampling = {"temperature": 0} if i % 3 == 0 else {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        reply = model.generate(asked(model), 120, schema=schema, seed=i, **sampling).result()
        assert reply.finish_reason in ("stop", "length")
        if reply.finish_reason == "stop":
            stopped += 1
            assert meets(schema, reply.text), (schema, reply.text)
    assert stopped > n / 5


class Shifted:
    """A mask that is off by one token."""

    def __init__(self, inner: Mask) -> None:
        self.inner = inner

    def allowed(self) -> NDArray[np.bool_] | None:
        allowed = self.inner.allowed()
        return None if allowed is None else np.roll(allowed, 1)

    def accept(self, token: int) -> None:
        self.inner.accept(token - 1)

    def prepare(self) -> None:
        self.inner.prepare()


def test_masks_that_are_off_by_one_token_would_be_noticed(tiny: Model) -> None:
    """The negative control of the test above."""
    r, met = random.Random("tiny"), 0
    for i in range(8):
        schema = some_schema(r)
        mask = Shifted(Grammar.json_schema(tiny.vocabulary, schema).mask(asked(tiny)))
        met += meets(schema, tiny.generate(asked(tiny), 60, mask=mask, seed=i).result().text)
    assert met == 0


def test_every_text_that_the_schema_allows_is_allowed_to_its_end() -> None:
    r = random.Random(8)
    for _ in range(40):
        value = {
            "a": r.choice(["", "x", "é🎉", '"\\']),
            "b": [r.randrange(-99, 99) for _ in range(r.randrange(4))],
        }
        schema = {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"type": "integer"}}},
        }
        separators, indent = r.choice([(None, None), ((",", ":"), None), (None, 2)])
        text = json.dumps(value, separators=separators, indent=indent, ensure_ascii=False)
        assert may_say(Grammar.json_schema(HYBRID, schema, strict=indent is None), text), text


# ----------------------------------------------------------------------------
# The same bytes


def test_a_reply_is_the_same_alone_among_others_and_computed_again(flat: Model) -> None:
    r = random.Random(3)
    kinds: list[Grammar | None] = [
        None,
        Grammar.json_object(flat.vocabulary),
        Grammar.json_schema(flat.vocabulary, some_schema(random.Random(1))),
        Grammar.regex(flat.vocabulary, "[a-z ]{5,30}"),
        Grammar.choice(flat.vocabulary, ["yes", "no"]),
        Grammar.tools(flat.vocabulary, TOOLS),
        Grammar.tools(flat.vocabulary, TOOLS, "required"),
        Grammar.tools(flat.vocabulary, TOOLS, "none"),
    ]
    cases = [
        ([r.randrange(200) for _ in range(r.randrange(1, 30))], kind, i) for i, kind in enumerate(kinds * 2)
    ]

    def reply_state(prompt: list[int], grammar: Grammar | None, seed: int) -> ReplyState:
        mask = grammar.mask(prompt) if grammar else None
        sampling = Sampling(temperature=1.0, seed=seed)
        return ReplyState(flat.vocabulary, prompt, sampling, 40, ReplySettings(mask=mask, logprobs=1))

    def alone(case: tuple[list[int], Grammar | None, int]) -> list[Event]:
        return [event for _, event in drive(flat, [(case[0], reply_state(*case))], 1)]

    expected = [alone(case) for case in cases]
    assert [alone(case) for case in cases] == expected
    together: list[list[Event]] = [[] for _ in cases]
    for i, event in drive(flat, [(case[0], reply_state(*case)) for case in cases], 8):
        together[i].append(event)
    assert together == expected
    # every row computed again, masks prepared in the other thread or not
    for n, (case, events) in enumerate(zip(cases, expected, strict=True)):
        tokens = [event.token for event in events if event.token is not None]
        rows = flat.session().forward([*case[0], *tokens], logits="all")[len(case[0]) - 1 :]
        again = reply_state(*case)
        found = []
        for row in rows[: len(tokens)]:
            for _ in range(n % 3):
                again.prepare()
            found.append(again.take(row))
        assert found == events


def test_many_replies_share_a_grammar(flat: Model) -> None:
    prompts = [[1, 2, 3], [4, 5], [6]]
    many = [Reply() for _ in prompts]
    for i, event in flat.generate_many(prompts, 60, schema=OBJECT, seeds=[1, 2, 3], temperature=1.0):
        many[i].add(event)
    for prompt, seed, reply in zip(prompts, [1, 2, 3], many, strict=True):
        assert (
            flat.generate(prompt, 60, schema=OBJECT, seed=seed, temperature=1.0).result().text == reply.text
        )


# ----------------------------------------------------------------------------
# After the thinking


JSON = Grammar.json_object(HYBRID)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (USER, '{"a": 1}'),  # a hybrid may think, or not
        (USER, '<think>\nhm {"\n</think>\n\n{"a": 1}'),
        (USER, '<think>hm</think>{"a": 1}'),
        (USER + "<think>\n", 'hm [\n</think>\n\n{"a": 1}'),
        (USER + "<think>\n", 'hm</think>\n{"a": 1}'),
        (CLOSED, '{"a": 1}'),
        ("def f", '{"a": 1}'),
    ],
)
def test_a_grammar_begins_after_the_thinking(prompt: str, text: str) -> None:
    assert may_say(JSON, text, prompt)
    reply, replying = Reply(), state(JSON, prompt)
    for id in [*TOKENIZER.encode(text, special=True), END]:
        assert id is not None
        reply.add(replying.take(wanting(id)))
    assert json.loads(reply.text) == {"a": 1} and reply.text == '{"a": 1}' and reply.finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "text", "until"),
    [
        (CLOSED, "<think>\n", ""),
        ("def f", "<think>\n", ""),
        (USER, "hm", ""),
        (USER, "<think>hm</think>no", "<think>hm</think>"),
        (USER, "<think>hm</think>\n\n\n\n{}", "<think>hm</think>\n\n"),
        (USER, "<think>hm</think><think>", "<think>hm</think>"),
        (USER, '{"<think>', '{"'),
        (USER, "<think>hm<|im_end|>", "<think>hm"),  # an end in the thought would be no answer
        (USER + "<think>\n", "hm<tool_call>", "hm"),
        (USER + "<think>\n", "hm<think>", "hm"),
    ],
)
def test_what_would_break_out_of_thinking_or_answer_is_forbidden(prompt: str, text: str, until: str) -> None:
    assert said(state(JSON, prompt), text) == until + "…"


def test_a_model_that_does_not_think_is_not_let_think() -> None:
    plain = vocabulary("none")
    grammar = Grammar.json_object(plain)
    assert said(state(grammar, USER, plain), "<think>") == "…"
    assert said(state(grammar, USER, plain), "{}") == "{}"


def test_a_hybrid_model_thinks_and_answers_by_its_schema(tmp_path_factory: pytest.TempPathFactory) -> None:
    for kind in ("hybrid", "always"):
        path = export_small_model(tmp_path_factory.mktemp(kind), std=0.05, thinking=kind, context=512)
        model = Model(str(path), threads=1)
        prompt = model.chat_prompt("hi")
        schema, n_thoughts = {"enum": ["yes", "no"]}, 0
        for seed in range(12):
            reply = model.generate(
                prompt, schema=schema, thinking_budget=20, seed=seed, temperature=1.0, top_k=0, top_p=1.0
            ).result()
            assert reply.finish_reason == "stop" and json.loads(reply.text) in ("yes", "no")
            n_thoughts += bool(reply.thinking)
        assert n_thoughts > 0


# ----------------------------------------------------------------------------
# The budget of the thinking


def thought(events: list[Event]) -> int:
    """How many tokens came before </think>."""
    tokens = [event.token for event in events]
    return tokens.index(TOKENIZER.control_id("</think>"))


def reply_of(replying: ReplyState, text: str) -> list[Event]:
    """The events of a model that wants to say `text` for as long as it is asked, whatever comes of it."""
    events = []
    for wanted in TOKENIZER.encode(text, special=True):
        events.append(replying.take(wanting(wanted)))
        if events[-1].finish_reason:
            break
    return events


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("grammar", [None, JSON])
def test_the_thought_ends_at_its_budget(budget: int, grammar: Grammar | None) -> None:
    events = reply_of(state(grammar, USER + "<think>\n", thinking_budget=budget, logprobs=2), "h" * 20)
    assert thought(events) == budget
    assert all(event.logprob is not None and event.logprob < 0 for event in events[budget:])
    opened = reply_of(state(grammar, USER, thinking_budget=budget), "<think>" + "h" * 20)
    assert thought(opened) == budget + 1


def test_a_thought_within_its_budget_is_left_alone() -> None:
    text = "<think>hm</think>\n\n{}"
    assert said(state(JSON, USER, thinking_budget=2), text) == text
    assert said(state(JSON, USER, thinking_budget=1000), text) == text
    assert said(state(None, "x", thinking_budget=0), "hello") == "hello"
    inside = "<think>h<tool_call></think></tool_call>"  # a tag within a call is text, and ends no thought
    assert said(state(None, USER, thinking_budget=9), inside) == inside


def test_a_budget_that_means_nothing_is_refused() -> None:
    for budget, complaint in [
        (-1, "-1 is negative"),
        (1.5, "not a whole number"),
        (True, "not a whole number"),
    ]:
        with pytest.raises(ValueError, match=f"thinking_budget = .*{complaint}"):
            state(None, thinking_budget=budget)
    with pytest.raises(ValueError, match="thinking_budget = 5: the vocabulary has no token </think>"):
        ReplyState(Vocabulary(8, frozenset()), [1], Sampling(), 5, ReplySettings(thinking_budget=5))


# ----------------------------------------------------------------------------
# Tool calls


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
DEFINITIONS = [{"name": "get.weather", "parameters": CITY}, {"name": "ping"}]
TOOLS = ToolSet(DEFINITIONS)
CODER = ToolSet(DEFINITIONS, "qwen3-coder")


def hermes(name: str, **arguments: Any) -> str:
    return "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"


def coder(name: str, **arguments: Any) -> str:
    values = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


@pytest.mark.parametrize(("tools", "call"), [(TOOLS, hermes), (CODER, coder)])
@pytest.mark.parametrize("before", ["", "<think>\nhm\n</think>\n\n"])
def test_the_choice_of_tools_says_what_may_come(
    tools: ToolSet, call: Callable[..., str], before: str
) -> None:
    weather, ping = call("get.weather", city="Paris", days=3), call("ping")
    texts = ["", "hi", weather, ping, f"hi\n{weather}", f"{weather}\n{ping}", f"{ping}\nhi", call("pong"),
             call("get.weather"), "<tool_call>hi"]  # fmt: skip
    allowed = {
        "auto": (Grammar.tools(HYBRID, tools), [0, 1, 2, 3, 4, 5, 6]),
        "one": (Grammar.tools(HYBRID, tools, parallel=False), [0, 1, 2, 3, 4]),
        "required": (Grammar.tools(HYBRID, tools, "required"), [2, 3, 5]),
        "required one": (Grammar.tools(HYBRID, tools, "required", parallel=False), [2, 3]),
        "named": (Grammar.tools(HYBRID, tools, name="ping"), [3]),
        "none": (Grammar.tools(HYBRID, tools, "none"), [0, 1]),
        "or an answer": (Grammar.tools(HYBRID, tools, answer=Grammar.choice(HYBRID, ["hi"])), [1, 2, 3, 5]),
    }
    for name, (grammar, good) in allowed.items():
        found = [i for i, text in enumerate(texts) if may_say(grammar, before + text, USER)]
        assert found == good, name


def test_an_answer_by_a_schema_and_calls_share_a_grammar() -> None:
    answer = Grammar.json_schema(HYBRID, OBJECT)
    grammar = Grammar.tools(HYBRID, TOOLS, answer=answer)
    assert (
        may_say(grammar, '{"name": "x"}') and may_say(grammar, hermes("ping")) and not may_say(grammar, "{}")
    )


def test_the_values_of_coder_calls_are_of_their_types() -> None:
    properties = {
        "text": {"type": "string"},
        "unit": {"enum": ["C", "F", None]},
        "maybe": {"anyOf": [{"$ref": "#/$defs/T"}, {"type": "null"}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/T"}},
    }
    parameters = {"type": "object", "properties": properties, "$defs": {"T": {"type": "string"}}}
    tools = ToolSet([{"name": "f", "parameters": parameters, "strict": True}], "qwen3-coder")
    grammar = Grammar.tools(HYBRID, tools, "required")
    for good in (
        coder("f"),
        coder("f", text="a\n<b>\n\n</param", unit="null", maybe="x", list='["</function>"]'),
    ):
        assert may_say(grammar, good)
        assert tools.calls(good.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    for bad in (
        coder("f", unit="K"),
        coder("f", list="a"),
        coder("f", other="x"),
        coder("f", text="a\n</parameter>\nb"),
        coder("f", text="<parameter=unit>"),
        coder("f", text="a").replace("</function>", ""),
    ):
        assert not may_say(grammar, bad), bad


def test_calls_that_a_model_is_held_to_are_read_back(flat: Model) -> None:
    r = random.Random(4)
    for i in range(12):
        parameters = {**some_schema(r), "additionalProperties": False}
        for format in ("hermes", "qwen3-coder"):
            tools = ToolSet([{"name": "f", "parameters": parameters}], format)
            grammar = Grammar.tools(flat.vocabulary, tools, "required", parallel=False)
            reply = flat.generate(
                [1, 2], 150, grammar=grammar, toolset=tools, seed=i, temperature=1.0
            ).result()
            if reply.finish_reason == "stop":
                (call,) = reply.tool_calls
                assert call["name"] == "f" and not reply.text
                if format == "hermes" or not grammar.dropped:
                    assert meets(parameters, json.dumps(call["arguments"])), (parameters, call)


def test_what_a_tool_loses_is_said_and_a_strict_tool_is_refused() -> None:
    parameters = {"type": "object", "properties": {"to": {"type": "string", "format": "zzz", "maxLength": 5}}}
    for format, dropped in [
        ("hermes", ["f.properties.to.format"]),
        ("qwen3-coder", ["f.to.format", "f.to.maxLength"]),
    ]:
        tool = {"name": "f", "parameters": parameters}
        assert Grammar.tools(HYBRID, ToolSet([tool], format)).dropped == dropped  # type: ignore[arg-type]
        with pytest.raises(GrammarError, match="^tool f: .*format"):
            Grammar.tools(HYBRID, ToolSet([{**tool, "strict": True}], format))  # type: ignore[arg-type]


def test_choices_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(GrammarError, match="tool_choice names 'pong', which is not among the tools"):
        Grammar.tools(HYBRID, TOOLS, name="pong")
    with pytest.raises(GrammarError, match="tools is empty"):
        Grammar.tools(HYBRID, ToolSet([]), "required")
    with pytest.raises(GrammarError, match="cannot be held to tool calls"):
        Grammar.tools(Vocabulary(8, frozenset({1})), TOOLS)
    assert Grammar.tools(Vocabulary(8, frozenset({1})), TOOLS, "none").mask([1]).allowed() is None


# ----------------------------------------------------------------------------
# From Python


def test_generate_takes_one_constraint(flat: Model) -> None:
    compiled = Grammar.choice(flat.vocabulary, ["no"])
    for options, text in [
        ({"schema": {"const": 5}}, "5"),
        ({"schema": '{"const": 5}'}, "5"),
        ({"regex": "a{3}"}, "aaa"),
        ({"choice": ["yes"]}, "yes"),
        ({"grammar": 'start: "lark"'}, "lark"),
        ({"grammar": compiled}, "no"),
    ]:
        assert flat.generate([1], 9, **options).result().text == text  # type: ignore[arg-type]
        assert flat.complete("a", 9, **options).text == text  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schema and regex are given: an answer is held to one of them"):
        flat.generate([1], schema={}, regex="a")
    with pytest.raises(ValueError, match="choice and mask are given"):
        flat.generate([1], choice=["a"], mask=compiled.mask([1]))
    with pytest.raises(ValueError, match="made for another model"):
        flat.generate([1], grammar=JSON)
    with pytest.raises(ValueError, match="Unimplemented"):
        flat.generate_many([[1]], schema={"not": {}})
    for nothing in ({"schema": None}, {"grammar": None, "thinking_budget": None}):
        assert list(flat.generate([1], 5, seed=1, **nothing)) == list(flat.generate([1], 5, seed=1))  # type: ignore[arg-type]


def test_a_schema_that_ends_by_length_stays_text(flat: Model) -> None:
    reply = flat.generate([1], 3, schema=OBJECT, temperature=0).result()
    assert reply.finish_reason == "length" and re.match(r"\{\s*", reply.text)


def test_chat_reads_calls_in_the_format_of_the_template(tmp_path_factory: pytest.TempPathFactory) -> None:
    from qwen3c.format import ModelFile, ModelWriter

    directory = tmp_path_factory.mktemp("coder")
    file = ModelFile(export_small_model(directory, context=512))
    template = file.template + "{# <function=example> #}"
    with ModelWriter(directory / "coder.bin", file.config, file.metadata, file.tokenizer, template) as writer:
        for tensor in writer.tensors:
            writer.write(file.data(tensor))
            writer.end_tensor()
    model = Model(str(directory / "coder.bin"), threads=1)
    required = Grammar.tools(model.vocabulary, ToolSet([{"name": "ping"}], "qwen3-coder"), name="ping")
    reply = model.chat("hi", 90, thinking=False, tools=[{"name": "ping"}], grammar=required, temperature=0)
    assert reply.tool_calls == [{"name": "ping", "arguments": {}}] and reply.finish_reason == "stop"
