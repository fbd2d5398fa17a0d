"""The public Model: text to text, what it refuses and in which words, its end, its copies, its documentation.

python -m pytest tests/test_model.py
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import gc
import importlib
import inspect
import multiprocessing
import pickle
import re
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import TINY_QWEN3, export_small_model

import qwen3c
from qwen3c import CachedSession, Generation, Model, Reply, Sampling, Session, engine
from qwen3c.cli.options import RAW_TOKENS
from qwen3c.drivers.generate import AnswerOptions, ReplyOptions
from qwen3c.drivers.sampler import SamplingOptions
from qwen3c.format import ModelFile, ModelWriter
from qwen3c.inspect.perplexity import measure

ROOT = Path(__file__).parents[1]
QUESTION = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(str(TINY_QWEN3), threads=1)


@pytest.fixture
def opened() -> Iterator[Model]:
    """A model of the test's own, to close."""
    with Model(TINY_QWEN3, threads=1) as model:
        yield model


class Scripted(Model):
    """A model whose next tokens the test chooses."""

    said = ""

    def generate(self, *args: Any, **options: Any) -> Generation:
        generation = super().generate(*args, **options)
        tokens = iter(self.tokenizer.encode(self.said, special=True))
        generation._state._sampler.sample = lambda logits, allowed=None: next(tokens)  # type: ignore[method-assign]
        return generation


# ----------------------------------------------------------------------------
# Text to text


def test_chat_is_the_reply_to_the_prompt_of_the_messages(model: Model) -> None:
    generation = model.generate(model.chat_prompt(QUESTION, thinking=False), 30, seed=1)
    events = list(generation)
    reply = model.chat(QUESTION, 30, thinking=False, seed=1)
    assert reply.text == str(reply) == "".join(event.text for event in events) != ""
    assert reply.finish_reason == events[-1].finish_reason
    assert reply.stats.generated_tokens == len(generation.tokens) and reply.stats.seed == 1
    assert model.chat(QUESTION[0]["content"], 30, thinking=False, seed=1).text == reply.text
    assert model.chat_prompt(QUESTION[0]["content"]) == model.chat_prompt(QUESTION)


def test_a_reply_holds_thought_answer_and_calls_apart(tmp_path: Path) -> None:
    model = Scripted(export_small_model(tmp_path), threads=1)
    model.said = (
        '<think>\nhm\n</think>\n\nyes<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    reply = model.chat("go", thinking=True, tools=[tool])
    assert (reply.thinking, reply.text, reply.finish_reason) == ("hm", "yes", "stop")
    assert reply.tool_calls == [{"name": "f", "arguments": {}}]
    assert "2 characters of thought" in repr(reply) and "calls f" in repr(reply)


def test_complete_goes_on_from_bare_text(model: Model) -> None:
    ids = [*model.tokenizer.opening, *model.tokenizer.encode("def add(a, b):")]
    expected = model.generate(ids, 20, temperature=0).result()
    assert model.text_prompt("def add(a, b):") == ids
    assert model.complete("def add(a, b):", 20, temperature=0).text == expected.text != ""


def test_a_completion_nobody_bounds_is_as_long_as_that_of_the_command_line() -> None:
    assert inspect.signature(Model.complete).parameters["max_tokens"].default == RAW_TOKENS


def test_calls_share_a_session_and_every_other_option_of_generate(model: Model) -> None:
    session, told = CachedSession(model), []
    first = model.chat(QUESTION, 10, session=session, seed=1)
    again = model.chat(QUESTION, 10, session=session, seed=1, progress=lambda *done: told.append(done))
    assert again.text == first.text and told
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert model.complete("x", cancel=lambda: True).finish_reason == "cancelled"
    full = model.complete("import", 20, seed=1).text
    stop = full[3:6]
    assert model.complete("import", 20, seed=1, stop=stop).text == full[: full.index(stop)]
    names = ReplyOptions.__optional_keys__ - AnswerOptions.__optional_keys__
    own = {"self", "prompt", "max_tokens", "logprobs", "options"}
    assert names == inspect.signature(Model.generate).parameters.keys() - own


# ----------------------------------------------------------------------------
# What is refused, and in which words


def test_the_keywords_of_a_call_are_the_fields_of_sampling() -> None:
    fields = typing.get_type_hints(Sampling)
    assert list(fields) == list(SamplingOptions.__annotations__)
    assert {name: hint | None for name, hint in fields.items()} == typing.get_type_hints(SamplingOptions)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Unpack is in typing from 3.11 on")
def test_annotations_can_be_evaluated() -> None:
    """By what makes forms, schemas or command lines of a function's annotations."""
    assert typing.get_type_hints(Model.generate)["options"] == typing.Unpack[AnswerOptions]
    assert typing.get_type_hints(Model.chat)["options"] == typing.Unpack[ReplyOptions]
    for function in (
        Model.__init__,
        Model.forward,
        Model.complete,
        Model.sampling,
        Model.embed,
        Model.rerank,
    ):
        assert typing.get_type_hints(function)


def test_a_type_checker_finds_a_misspelt_or_mistyped_option(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    wrong = [
        'model.chat("hi", temprature=3)',
        'model.chat("hi", temperature="3")',
        'model.complete("hi", logprob=3)',
        "model.generate([1], temprature=3)",
        "model.sampling(True, seeds=3)",
        'Model("model.bin", thread=3)',
        "model.chat(3)",
    ]
    right = [
        'model.chat("hi", 3, temperature=1, stop="x", seed=None).text.upper()',
        "model.generate([1], seed=3)",
    ]
    program = tmp_path / "program.py"
    program.write_text("\n".join(["from qwen3c import Model", 'model = Model("model.bin")', *wrong, *right]))
    flags = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, f"--cache-dir={tmp_path}", str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lines = {int(line) for line in re.findall(r"program\.py:(\d+): error", done.stdout)}
    assert lines == set(range(3, 3 + len(wrong))), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.chat("a", temprature=3), "chat() * 'temprature'. Did you mean 'temperature'?"),
        (lambda m: m.chat("a", max_new_tokens=3), "chat() * 'max_new_tokens'. Did you mean 'max_tokens'?"),
        (lambda m: m.complete("a", stops="x"), "complete() * 'stops'. Did you mean 'stop'?"),
        (lambda m: m.generate([1], temp=3), "generate() * 'temp'. Did you mean 'temperature'?"),
        (lambda m: m.generate([1], logprob=3), "generate() * 'logprob'. Did you mean 'logprobs'?"),
        (lambda m: m.generate([1], sampling=3), "generate() * 'sampling'"),
        (lambda m: m.chat("a", options=3), "chat() * 'options'*"),
        (lambda m: m.sampling(True, seeds=3), "sampling() * 'seeds'. Did you mean 'seed'?"),
        (lambda m: m.generate([1], qqq=3), "generate() * 'qqq'"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest(
    model: Model, call: Callable[[Model], object], message: str
) -> None:
    expected = re.escape("Model." + message.replace("*", "got an unexpected keyword argument", 1))
    with pytest.raises(TypeError, match=f"^{expected.replace(re.escape('*'), '.*')}$"):
        call(model)


def test_a_model_made_with_wrong_arguments_says_so_before_it_opens_anything() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: Model(), r"Model() missing 1 required positional argument: 'path'"),  # type: ignore[call-arg]
        (
            lambda: Model("no such file", thread=2),  # type: ignore[call-arg]
            "Model() got an unexpected keyword argument 'thread'. Did you mean 'threads'?",
        ),
        (lambda: Model("no such file", 1, "f16", "int8", False, 6), "Model() too many positional arguments"),  # type: ignore[arg-type, call-arg]
        (lambda: Scripted(), r"Scripted() missing 1 required positional argument: 'path'"),  # type: ignore[call-arg]
    ]
    for make, message in wrong:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            make()


def test_text_of_another_type_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="text is list, not text"):
        model.complete([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="messages is not a list"):
        model.chat(5)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------
# Its end


def is_mapped(path: str) -> bool:
    return path in Path("/proc/self/maps").read_text()


def needs_weights(model: Model, session: Session) -> dict[str, Callable[[], object]]:
    return {
        "session": model.session,
        "session.forward": lambda: session.forward([1]),
        "forward": lambda: model.forward([(session, [1])]),
        "trace": lambda: model.trace([1]),
        "logit_lens": lambda: model.logit_lens(np.zeros((1, model.config.dim), np.float32)),
        "weight": lambda: model.weight("model.norm.weight"),
        "chat": lambda: model.chat("hi"),
        "complete": lambda: model.complete("hi"),
        "generate": lambda: model.generate([1]),
        "embed": lambda: model.embed(["a"]),
        "rerank": lambda: model.rerank("a", ["b"]),
        "tokenizer": lambda: model.tokenizer,
        "chat_template": lambda: model.chat_template,
        "undefined_tokens": lambda: model.undefined_tokens,
        "chat_prompt": lambda: model.chat_prompt("hi"),
        "enter": model.__enter__,
        "pickle": lambda: pickle.dumps(model),
    }


def test_a_closed_model_refuses_in_one_line_whatever_it_is_asked(opened: Model) -> None:
    session = opened.session()
    session.forward([1, 2])
    opened.chat("hi", 3)
    opened.close()
    opened.close()
    for name, call in needs_weights(opened, session).items():
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"{TINY_QWEN3}: the model is closed", name
    session.rewind(0)  # gives its memory back
    assert opened.closed and opened.config.n_layers and opened.metadata["name"] and "closed" in repr(opened)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_leaving_the_block_unmaps_the_file_and_ends_the_child(tmp_path: Path) -> None:
    path = str(export_small_model(tmp_path))
    with Model(path, threads=1) as model:
        assert is_mapped(path)
        model.chat("hi", 3)
        child = model.chat_template._renderer._child
        assert child is not None and child.poll() is None
    assert not is_mapped(path)
    gc.collect()
    assert child.poll() is not None


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_an_error_in_the_block_closes_too_and_a_view_somebody_holds_stays_good(tmp_path: Path) -> None:
    path = str(export_small_model(tmp_path))
    with pytest.raises(KeyError), Model(path, threads=1):
        raise KeyError
    assert not is_mapped(path)
    with Model(path, threads=1) as model:
        view = model.file.data(model.file.tensors[0])
        expected = bytes(view)
    assert bytes(view) == expected


def test_closing_waits_for_a_call_of_another_thread(opened: Model) -> None:
    session, ids = opened.session(), [1] * 400
    expected = Model(TINY_QWEN3, threads=1).session().forward(ids)
    begun, results = threading.Event(), []

    def compute() -> None:
        begun.set()
        with contextlib.suppress(ValueError):
            results.append(session.forward(ids))

    thread = threading.Thread(target=compute)
    thread.start()
    begun.wait()
    opened.close()
    thread.join()
    # the call came first or was refused; it never read what was no longer there
    assert all(np.array_equal(result, expected) for result in results)
    with pytest.raises(ValueError, match="closed"):
        session.forward([1])


# ----------------------------------------------------------------------------
# Its copies


def reply_of(model: Model) -> str:
    """What a spawned worker does with the model it was sent."""
    return model.complete("def add(", 8, temperature=0).text


def test_a_pickled_model_is_its_path_and_options() -> None:
    model = Model(TINY_QWEN3, 1, "int8", "float32")
    data = pickle.dumps(model)
    assert len(data) < 1000
    for other in (pickle.loads(data), copy.copy(model), copy.deepcopy(model)):
        assert other is not model and other.session() and reply_of(other) == reply_of(model)
        same = ("path", "threads", "kv", "activations")
        assert [getattr(other, name) for name in same] == [getattr(model, name) for name in same]
        other.close()
    assert reply_of(model)  # closing a copy closes the copy alone


def test_the_path_of_a_pickled_model_does_not_depend_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_small_model(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Model("model.bin", threads=1))
    monkeypatch.chdir("/")
    assert pickle.loads(data).path == str(tmp_path / "model.bin")


def test_a_spawned_worker_gets_the_model(model: Model) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(reply_of, [model]) == reply_of(model)


def test_what_runs_cannot_be_pickled_and_says_so(model: Model) -> None:
    for thing in (model.generate([1]), CachedSession(model), model.session()):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=f"^a {type(thing).__name__} cannot be pickled or copied: "):
                attempt(thing)
    reply = model.complete("a", 3, seed=1)
    assert pickle.loads(pickle.dumps(reply)) == reply


# ----------------------------------------------------------------------------
# Damage: weights that overflow, in a file that is otherwise sound


def rewritten(
    path: Path, target: Path, changes: dict[str, Callable[[bytearray], None]], n_tokens: int | None = None
) -> Path:
    file = ModelFile(path)
    config = dataclasses.replace(file.config, n_tokens=n_tokens or file.config.n_tokens)
    with ModelWriter(target, config, file.metadata, file.tokenizer, file.template) as writer:
        for tensor in writer.tensors:
            data = bytearray(file.data(tensor))
            changes.get(tensor.name, lambda data: None)(data)  # type: ignore[no-untyped-call]
            writer.write(bytes(data))
            writer.end_tensor()
    return target


def fill_norm(value: float) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        np.frombuffer(data, "<f4")[:] = value

    return change


def largest_scales_in_the_last_rows(data: bytearray) -> None:
    """Change the scales of the last 16 rows of a matrix (512, 64), group 64: one tile, scales behind its
    codes.
    """
    np.frombuffer(data, "<f2")[-16:] = 65504


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_logits_that_overflow_are_one_error_wherever_they_are_used(
    tmp_path: Path, activations: engine.Activations
) -> None:
    path = rewritten(
        export_small_model(tmp_path), tmp_path / "bad.bin", {"model.norm.weight": fill_norm(3e38)}
    )
    model = Model(path, threads=1, activations=activations)
    calls: dict[str, Callable[[], object]] = {
        "greedy": lambda: model.generate([1], 3, temperature=0).result(),
        "sampled": lambda: model.generate([1], 3, temperature=1.0, top_k=0, top_p=1.0).result(),
        "top-k": lambda: model.generate([1], 3, temperature=1.0, top_k=5, top_p=0.5).result(),
        "logprobs": lambda: list(model.generate([1], 3, logprobs=3)),
        "chat": lambda: model.chat("hi"),
        "complete": lambda: model.complete("hi"),
        "perplexity": lambda: measure(model, [1, 2, 3], 3),
        "forward": lambda: model.session().forward([1]),
        "all": lambda: model.session().forward([1, 2], "all"),
        "batch": lambda: model.forward([(model.session(), [1]), (model.session(), [2])]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError) as caught:
            call()
        assert re.fullmatch(
            rf"{path}: the model's logits are not finite \((nan|-?inf) of token \d+\): "
            "the file is damaged or its weights overflow",
            str(caught.value),
        ), f"{name}: {caught.value}"
    with pytest.raises(ValueError, match=r"the model's hidden state is not finite \(-?(inf|nan) at \d+\)"):
        model.session().forward([1], "hidden")


def test_a_trace_still_shows_where_a_number_overflowed(tmp_path: Path) -> None:
    path = rewritten(
        export_small_model(tmp_path), tmp_path / "bad.bin", {"model.norm.weight": fill_norm(3e38)}
    )
    arrays = Model(path, threads=1).trace([1, 2])
    assert np.isfinite(arrays["model.layers.1"]).all() and not np.isfinite(arrays["model.norm"]).all()


@pytest.mark.parametrize("n_tokens", [None, 512], ids=["beyond the tokens", "undefined"])
def test_rows_that_stand_for_no_token_may_overflow(tmp_path: Path, n_tokens: int | None) -> None:
    changes = {
        "model.norm.weight": fill_norm(1e32),
        "model.embed_tokens.weight": largest_scales_in_the_last_rows,
    }
    path = rewritten(export_small_model(tmp_path), tmp_path / "odd.bin", changes, n_tokens)
    model = Model(path, threads=1)
    logits = model.session().forward([1])
    assert not np.isfinite(logits[-16:]).all() and np.isfinite(logits[:-16]).all()
    assert bool(model.undefined_tokens) == bool(n_tokens)


# ----------------------------------------------------------------------------
# What help() shows


def test_every_name_is_there_and_nothing_heavy_is_imported_for_it() -> None:
    program = """
import sys, qwen3c
assert "numpy" not in sys.modules and "Conversation" in dir(qwen3c)
for name in qwen3c.__all__:
    getattr(qwen3c, name)
assert "asyncio" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    expected = {
        "Model",
        "Conversation",
        "Reply",
        "Event",
        "Generation",
        "Sampling",
        "CachedSession",
        "Session",
    }
    assert expected < set(qwen3c.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        _ = qwen3c.Modle


def members(kind: type) -> dict[str, Any]:
    """Public names of a class that a user may call or read, but for the plain fields of a dataclass."""
    fields = getattr(kind, "__dataclass_fields__", {})
    return {
        name: value
        for base in reversed(kind.__mro__)
        if base.__module__.startswith("qwen3c")
        for name, value in vars(base).items()
        if not name.startswith("_") and name not in fields
    }


def undocumented(kind: type, names: set[str]) -> list[str]:
    """The members among `names` without a docstring, or callable without a signature."""
    faults = [] if inspect.getdoc(kind) else [f"{kind.__name__}: no docstring"]
    for name in sorted(names):
        value = members(kind)[name]
        if not getattr(value, "__doc__", None):
            faults.append(f"{kind.__name__}.{name}: no docstring")
        if callable(value):
            try:
                inspect.signature(value)
            except ValueError:
                faults.append(f"{kind.__name__}.{name}: no signature")
    return faults


def test_help_says_something_of_every_public_name() -> None:
    assert qwen3c.__doc__ and str(inspect.signature(Model)).startswith("(path: ")
    engine_side = set(members(engine.Engine))
    faults = []
    for name in qwen3c.__all__:
        value = getattr(qwen3c, name)
        if isinstance(value, type) and value is not Session:
            own = members(value).keys() - (engine_side - vars(Model).keys() if value is Model else set())
            faults += undocumented(value, own)
            assert own or value in (qwen3c.Event, qwen3c.ModelFileError, Sampling), name
    assert not faults


def test_help_says_something_of_every_name_of_the_engine() -> None:
    faults = []
    for node in stub().body:
        if isinstance(node, ast.ClassDef):
            names = {entry.name for entry in node.body if isinstance(entry, ast.FunctionDef)}
            faults += undocumented(getattr(engine, node.name), {n for n in names if not n.startswith("_")})
    assert not faults


def test_the_docstring_of_a_model_says_what_its_fields_are() -> None:
    (node,) = (n for n in stub().body if isinstance(n, ast.ClassDef) and n.name == "Engine")
    fields = {ast.unparse(entry.target) for entry in node.body if isinstance(entry, ast.AnnAssign)}
    assert {"config", "metadata", "path"} < fields
    assert not [name for name in fields if f"{name}:" not in str(Model.__doc__)]


def stub() -> ast.Module:
    return ast.parse((ROOT / "qwen3c" / "engine" / "engine.pyi").read_text())


def parameters(function: ast.FunctionDef) -> list[str]:
    return [
        argument.arg
        for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    ]


def test_the_stub_of_the_engine_and_the_engine_agree() -> None:
    for node in stub().body:
        if isinstance(node, ast.Assign):
            value = eval(ast.unparse(node.value), vars(typing))
            assert getattr(engine, ast.unparse(node.targets[0])) == value
        if isinstance(node, ast.AnnAssign):
            assert hasattr(engine, ast.unparse(node.target))
        if isinstance(node, ast.FunctionDef):
            assert list(inspect.signature(getattr(engine, node.name)).parameters) == parameters(node), (
                node.name
            )
        if not isinstance(node, ast.ClassDef):
            continue
        kind, stated = getattr(engine, node.name), set()
        for entry in node.body:
            if isinstance(entry, ast.AnnAssign):
                assert isinstance(entry.target, ast.Name)
                stated.add(entry.target.id)
            if isinstance(entry, ast.FunctionDef):
                stated.add(entry.name)
                value = vars(kind)[entry.name]
                if callable(value) and entry.name != "__init__":
                    assert list(inspect.signature(value).parameters) == parameters(entry), entry.name
        assert {name for name in stated if not name.startswith("_")} == members(kind).keys()


def test_objects_say_what_they_are_in_one_line(model: Model, tmp_path: Path) -> None:
    assert re.fullmatch(r"<Model '.+', [\d.]+ [GM]iB, context \d+, 1 threads, kv f16>", repr(model))
    assert re.fullmatch(
        rf"<CachedSession of '.+', 0 of {model.config.context} tokens>", repr(CachedSession(model))
    )
    generation = model.generate(model.text_prompt("import"), 30, seed=1)
    assert (
        repr(generation)
        == f"<Generation, not begun: {generation.stats.prompt_tokens} tokens of prompt; iterate, or call "
        "result()>"
    )
    next(generation)
    assert re.fullmatch(r"<Generation of <Reply ['\"].*['\"], 1 tokens, unfinished>>", repr(generation))
    reply = generation.result()
    assert re.fullmatch(r"<Reply ['\"].{1,60}['\"], \d+ tokens, (stop|length)>", repr(reply))
    assert "\n" not in repr(Reply(text="a\nb" * 100))
    file = ModelFile(export_small_model(tmp_path))
    file.metadata["name"] = "\x1b[31mred\n"
    hostile = tmp_path / "hostile.bin"
    with ModelWriter(hostile, file.config, file.metadata, file.tokenizer, file.template) as writer:
        for tensor in writer.tensors:
            writer.write(file.data(tensor))
            writer.end_tensor()
    assert repr(Model(hostile, threads=1)).isprintable()


def test_every_lazy_name_lives_where_it_is_said_to() -> None:
    for name, home in qwen3c._HOMES.items():
        assert getattr(importlib.import_module(f"qwen3c.{home}"), name) is getattr(qwen3c, name)
