"""The same tokens give the same bits: whatever the ISA, threads, chunks, batch, cache or history of a
session.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import MIXED_RECIPE, export_small_model

from qwen3c import engine, format, memory
from qwen3c.engine import KV, Activations, Engine, Session, probes
from qwen3c.format import KV_TYPES, ModelFile, Tensor
from qwen3c.system.machine import default_threads

SHAPE = {
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 16,
    "group_size": 32,
}


EXPERTS = {"n_experts": 9, "n_experts_per_token": 3, "expert_hidden_dim": 32}
CASES: list[tuple[dict[str, Any], KV]] = [
    ({"architecture": "qwen3"}, "f16"),
    ({"architecture": "qwen3"}, "int8"),
    ({"architecture": "qwen3_moe", **EXPERTS}, "f16"),
    ({"architecture": "qwen2"}, "int8"),
    ({"architecture": "llama"}, "f32"),
    ({"architecture": "qwen3", "recipe": MIXED_RECIPE}, "f16"),
    ({"architecture": "qwen3_moe", **EXPERTS, "recipe": MIXED_RECIPE, "tied": False}, "int8"),
]


@pytest.fixture(
    scope="module",
    params=CASES,
    ids=lambda case: f"{case[0]['architecture']} {case[1]}{' mixed' * ('recipe' in case[0])}",
)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], KV]:
    """What a model is made of, and the type of its KV cache."""
    return request.param


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, case: tuple[dict[str, Any], KV]) -> Path:
    return export_small_model(tmp_path_factory.mktemp("engine"), context=2048, **SHAPE | case[0])


@pytest.fixture(scope="module")
def kv(case: tuple[dict[str, Any], KV]) -> KV:
    return case[1]


@pytest.fixture(scope="module")
def model(path: Path, kv: KV) -> Engine:
    return Engine(path, threads=2, kv=kv)


@pytest.fixture(autouse=True)
def widest_isa() -> Iterator[None]:
    before = engine.isa()
    yield
    engine.set_isa(before)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 500, 600)


@pytest.fixture(scope="module")
def whole(model: Engine, ids: np.ndarray) -> np.ndarray:
    """Logits of every position, from one call."""
    return model.session().forward(ids, logits="all")


# ----------------------------------------------------------------------------
# Bit equality


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_isa_and_threads_do_not_change_a_bit(
    path: Path, ids: np.ndarray, kv: KV, activations: Activations
) -> None:
    results = []
    for isa in engine.runnable_isas():
        engine.set_isa(isa)
        for threads in (1, 2, 3, 4):
            model = Engine(path, threads=threads, kv=kv, activations=activations)
            results.append(model.session().forward(ids[:300], logits="all"))
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_every_split_of_a_short_prompt(model: Engine, ids: np.ndarray, whole: np.ndarray) -> None:
    for cut in range(1, 17):
        session = model.session()
        first = session.forward(ids[:cut], logits="all")
        second = session.forward(ids[cut:17], logits="all")
        assert np.array_equal(np.concatenate([first, second]), whole[:17])


def test_random_splits_of_a_long_prompt(model: Engine, ids: np.ndarray, whole: np.ndarray) -> None:
    random = np.random.default_rng(2)
    for _ in range(100):
        cuts = np.unique(random.integers(1, 512, random.integers(1, 12)))
        session = model.session()
        for piece in np.split(ids[:512], cuts):
            last = session.forward(piece)
        assert np.array_equal(last, whole[511])


def test_batches_do_not_change_a_bit(model: Engine, ids: np.ndarray, whole: np.ndarray) -> None:
    random = np.random.default_rng(3)
    for n in range(1, 9):
        sessions, starts, batch = [], [], []
        for _ in range(n):
            start, length = int(random.integers(0, 280)), int(random.choice([1, 1, 3, 40, 270]))
            session = model.session()
            if start:
                session.forward(ids[:start])
            sessions.append(session)
            starts.append(start)
            batch.append((session, ids[start : start + length]))
        for logits in ("last", "all"):
            forks = [(session.fork(), tokens) for session, tokens in batch]
            for (_, tokens), start, out in zip(
                batch, starts, model.forward(forks, logits=logits), strict=True
            ):
                end = start + len(tokens)
                assert np.array_equal(out, whole[end - 1] if logits == "last" else whole[start:end])


def test_rewind_and_fork_leave_no_trace(model: Engine, ids: np.ndarray, whole: np.ndarray) -> None:
    session = model.session()
    session.forward(ids[:300])
    session.forward(ids[100:200])  # a different continuation
    session.rewind(290)
    other = session.fork()
    session.forward(ids[:40])
    session.rewind(290)
    other.rewind(10)
    assert np.array_equal(other.forward(ids[10:400], logits="all"), whole[10:400])
    assert np.array_equal(session.forward(ids[290:400], logits="all"), whole[290:400])


# ----------------------------------------------------------------------------
# Random histories

# positions at which a history may switch to the second text: around a KV block
SWITCHES = [0, 5, 100, 255, 256, 257, 300]
LENGTH = 330


@dataclass
class State:
    """A session, the text that its tokens are from, and the position where they switch to the other text."""

    session: Session
    text: int
    switch: int


class Histories:
    """Random operations on sessions, checked against logits computed in one piece."""

    def __init__(self, path: Path, kv: KV, oracle_kv: KV) -> None:
        random = np.random.default_rng(4)
        self.texts = random.integers(0, 500, (2, LENGTH))
        oracle = Engine(path, threads=1, kv=oracle_kv)
        # (first text, position of the switch) -> (LENGTH, vocab_size)
        self.expected = {
            (text, switch): oracle.session().forward(self.tokens(text, switch), logits="all")
            for text in (0, 1)
            for switch in SWITCHES
        }
        self.models = [Engine(path, threads=threads, kv=kv) for threads in (1, 2, 3)]
        self.differences = self.comparisons = 0

    def tokens(self, text: int, switch: int) -> np.ndarray:
        return np.concatenate([self.texts[text][:switch], self.texts[1 - text][switch:]])

    def run(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        model = self.models[seed % len(self.models)]
        engine.set_isa(
            engine.runnable_isas()[-1 - int(random.integers(0, min(2, len(engine.runnable_isas()))))]
        )
        states = [State(model.session(), int(random.integers(0, 2)), int(random.choice(SWITCHES)))]
        for _ in range(int(random.integers(2, 7))):
            operation = random.choice(["append", "append", "append", "rewind", "fork", "batch"])
            state = states[int(random.integers(0, len(states)))]
            session = state.session
            if operation == "append":
                self.append(model, [state], random)
            elif operation == "batch":
                self.append(model, states, random)
            elif operation == "fork":
                states.append(replace(state, session=session.fork()))
            else:
                session.rewind(int(random.integers(0, session.position + 1)))
                # tokens behind the new position are open again: choose any later switch
                later = [s for s in SWITCHES if s >= session.position]
                if later and session.position <= state.switch:
                    state.switch = int(random.choice(later))

    def append(self, model: Engine, states: list[State], random: np.random.Generator) -> None:
        batch, checks = [], []
        for state in states:
            session = state.session
            room = LENGTH - session.position
            n = min(room, int(random.choice([1, 2, 7, 30, 120, 300], p=[0.3, 0.2, 0.2, 0.15, 0.1, 0.05])))
            if n:
                batch.append(
                    (session, self.tokens(state.text, state.switch)[session.position : session.position + n])
                )
                checks.append(self.expected[state.text, state.switch][session.position + n - 1])
        for logits, expected in zip(model.forward(batch) if batch else [], checks, strict=True):
            self.comparisons += 1
            self.differences += not np.array_equal(logits, expected)


@pytest.fixture(scope="module")
def nano_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {
        "dim": 32,
        "hidden_dim": 32,
        "n_layers": 1,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 8,
        "group_size": 32,
    }
    return export_small_model(tmp_path_factory.mktemp("nano"), context=512, **shape)


def test_ten_thousand_random_histories_differ_nowhere(nano_path: Path) -> None:
    by_kv = [Histories(nano_path, kv, kv) for kv in ("f16", "int8")]
    for seed in range(10_000):
        by_kv[seed % 2].run(seed)
    assert [histories.differences for histories in by_kv] == [0, 0]
    assert all(histories.comparisons > 10_000 for histories in by_kv)


@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_random_histories_notice_a_cache_of_other_precision(nano_path: Path, kv: KV) -> None:
    histories = Histories(nano_path, kv, oracle_kv="f32")
    for seed in range(100):
        histories.run(seed)
    assert histories.differences > histories.comparisons / 2


# ----------------------------------------------------------------------------
# Damaged weights

TINY = SHAPE | {"dim": 32, "hidden_dim": 32, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 512, "tied": False}
DAMAGED: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"architecture": "qwen2", "head_dim": 16},
    "qwen3_moe": {
        "architecture": "qwen3_moe",
        "n_experts": 3,
        "n_experts_per_token": 3,
        "expert_hidden_dim": 32,
    },
    "mixed": {"recipe": MIXED_RECIPE},
}
TOKEN = 7


def damage(path: Path, tensor: Tensor, bad: float) -> memoryview:
    """The bytes of a model.bin with one number of a tensor changed; in a matrix, one scale."""
    file = ModelFile(path)
    weights = bytearray(file.weights)
    if not tensor.quantized:
        weights[tensor.offset + 4 : tensor.offset + 8] = np.float32(bad).tobytes()
        return memoryview(weights)
    assert tensor.shape[1] == file.config.group_size  # a tile row is one tile
    end = tensor.offset + format.tile_row_size(tensor.shape[1], file.config.group_size, tensor.encoding)
    scale = end - 32 + 2 * (TOKEN % 16)
    weights[scale : scale + 2] = np.float16(bad).tobytes()
    return memoryview(weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", DAMAGED)
def test_one_damaged_number_makes_every_logit_of_its_tokens_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bad: float
) -> None:
    path = export_small_model(tmp_path, **TINY | DAMAGED[kind])
    ids = np.array([3, TOKEN, 100, 200, 300])
    for tensor in ModelFile(path).tensors:
        weights = damage(path, tensor, bad)
        monkeypatch.setattr(
            "qwen3c.engine.engine.in_huge_pages", lambda _, weights=weights: weights
        )  # the damage is made after the checks of the file
        for kv in KV_TYPES:
            for activations in ("int8", "float32"):
                found = []
                for isa in engine.runnable_isas():
                    engine.set_isa(isa)
                    session = Engine(path, 1, kv, activations, huge_pages=True).session()  # type: ignore[arg-type]
                    found.append(np.concatenate([session.forward(ids, "all"), session.forward([50], "all")]))
                logits, case = found[0], (tensor.name, kv, activations)
                assert all(np.array_equal(logits, other, equal_nan=True) for other in found), case
                if tensor.name == "lm_head.weight":
                    assert not np.isfinite(logits[:, TOKEN]).any(), case
                    assert np.isfinite(np.delete(logits, TOKEN, 1)).all(), case
                elif tensor.name == "model.embed_tokens.weight":
                    assert np.isfinite(logits[0]).all() and not np.isfinite(logits[1:]).any(), case
                else:
                    assert not np.isfinite(logits).any(), case


# ----------------------------------------------------------------------------
# Sessions, errors, interruption


@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("kv", KV_TYPES)
def test_kv_memory_grows_with_use(tmp_path: Path, kv: KV, head_dim: int) -> None:
    model = Engine(export_small_model(tmp_path, context=262_144, **SHAPE | {"head_dim": head_dim}), kv=kv)
    session = model.session()
    assert session.context == 262_144 and session.kv_bytes == 0
    session.forward([1, 2, 3])
    one_block = session.kv_bytes
    assert one_block == 256 * model.config.kv_bytes_per_token(kv)
    session.forward(np.ones(254, int))
    assert session.kv_bytes == 2 * one_block
    session.rewind(1)
    assert session.kv_bytes == one_block


def test_positions_beyond_the_context_raise(model: Engine, ids: np.ndarray, whole: np.ndarray) -> None:
    session = model.session(context=100)
    session.forward(ids[:90])
    with pytest.raises(ValueError, match=r"11 more ids from position 90 .* context of 100"):
        session.forward(ids[90:101])
    assert session.position == 90
    assert np.array_equal(
        session.forward(ids[90:100]), whole[99]
    )  # an exact fit: the failed call changed nothing
    with pytest.raises(ValueError, match="context of 100"):
        session.forward([1])


BAD_IDS = [[], [[1, 2]], [-1], [512], [1.5], ["a"], None, [True], [2**40], np.zeros((2, 2), int)]


@pytest.mark.parametrize("bad", BAD_IDS, ids=repr)
def test_bad_ids_raise_and_leave_the_session_alone(model: Engine, bad: object) -> None:
    session = model.session()
    with pytest.raises(ValueError, match="ids|token id"):
        session.forward(bad)  # type: ignore[arg-type]
    assert session.position == 0 and session.kv_bytes == 0


def test_bad_arguments_raise(model: Engine, path: Path) -> None:
    session = model.session()
    session.forward([1, 2])
    for call in (
        lambda: session.rewind(3),
        lambda: session.rewind(-1),
        lambda: session.rewind("0"),  # type: ignore[arg-type]
        lambda: session.forward([1], logits="some"),  # type: ignore[arg-type]
        lambda: model.session(context=0),
        lambda: model.session(context=4096),
        lambda: model.forward([]),
        lambda: model.forward([(session, [1]), (session, [2])]),
        lambda: model.forward([(Engine(path).session(), [1])]),
        lambda: model.forward([(None, [1])]),  # type: ignore[list-item]
        lambda: Engine(path, threads=0),
        lambda: Engine(path, threads="two"),  # type: ignore[arg-type]
        lambda: Engine(path, kv="f8"),  # type: ignore[arg-type]
        lambda: Engine(path, activations="int4"),  # type: ignore[arg-type]
        lambda: engine.set_isa("pentium"),
        lambda: engine.top_k(np.array([1.0, np.nan, 2.0]), 1),
        lambda: engine.top_k(np.ones(3), 4),  # type: ignore[arg-type]
        lambda: engine.softmax(np.ones(3), 0.0),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError):
            call()
    assert session.position == 2


def test_an_interrupt_leaves_the_session_as_it_was(tmp_path: Path) -> None:
    model = Engine(export_small_model(tmp_path, context=4096, **(SHAPE | {"n_layers": 8})), threads=1)
    ids = np.random.default_rng(5).integers(0, 500, 3000)
    session = model.session()
    session.forward(ids[:100])
    engine.set_isa("scalar")  # slow enough to be caught in the middle
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for delay in (0.01, 0.05, 0.1):
            signal.setitimer(signal.ITIMER_REAL, delay)
            started = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                session.forward(ids[100:])
            assert time.monotonic() - started < 5
            assert session.position == 100
    finally:
        signal.signal(signal.SIGALRM, handler)
    engine.set_isa(engine.runnable_isas()[-1])
    assert np.array_equal(session.forward(ids[100:400]), model.session().forward(ids[:400]))


def test_threads_sharing_a_model_take_turns(model: Engine, ids: np.ndarray, whole: np.ndarray) -> None:
    wrong: list[int] = []

    def decode() -> None:
        session = model.session()
        for i in range(60):
            if not np.array_equal(session.forward(ids[i : i + 1]), whole[i]):
                wrong.append(i)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_gil_is_released(model: Engine, ids: np.ndarray) -> None:
    engine.set_isa("scalar")
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    started = time.monotonic()
    model.session().forward(ids[:16])
    elapsed = time.monotonic() - started
    done.set()
    thread.join()
    during = [t for t in ticks if started < t < started + elapsed]
    assert elapsed < 0.005 or during


def test_a_forked_child_can_run_a_model_its_parent_used(
    path: Path, kv: KV, ids: np.ndarray, whole: np.ndarray
) -> None:
    model = Engine(path, threads=2, kv=kv)
    model.session().forward(ids)  # the parent's OpenMP threads exist now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(model.session().forward(ids[:300]).tobytes()))
    child.start()
    result = queue.get(timeout=30)
    child.join(10)
    assert result == whole[299].tobytes()


def test_a_session_keeps_its_model_and_the_model_its_file(
    path: Path, kv: KV, ids: np.ndarray, whole: np.ndarray
) -> None:
    session: Session = Engine(path, threads=1, kv=kv).session()
    assert np.array_equal(session.forward(ids[:20]), whole[19])


def test_threads_and_isa_can_be_asked_for(path: Path) -> None:
    model = Engine(path, threads=3)
    assert model.threads == (3 if engine.OPENMP else 1)
    assert Engine(path).threads == (default_threads() if engine.OPENMP else 1)
    assert engine.isa() in engine.runnable_isas() and set(engine.runnable_isas()) <= set(engine.ISA_NAMES)
    assert engine.runnable_isas()[0] == "scalar"


WITHOUT_THREADS = """
import resource, sys, threading
import numpy as np
from qwen3c import engine

path, ids, limited, results = sys.argv[1], np.arange(200), threading.Event(), []
usual = engine.Engine(path, threads=2)

def another_thread():  # for which OpenMP starts threads of its own
    limited.wait()
    results.append(usual.session().forward(ids, "all"))

thread = threading.Thread(target=another_thread)
thread.start()
size = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (20 << 20), resource.RLIM_INFINITY))  # two stacks of 8 MiB
model = engine.Engine(path, threads=64)
results.append(model.session().forward(ids, "all"))
limited.set()
thread.join()
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
expected = usual.session().forward(ids, "all")
print(model.threads, len(results), all(np.array_equal(result, expected) for result in results))
"""


@pytest.mark.skipif(not engine.OPENMP or sys.platform != "linux", reason="no OpenMP, or no /proc")
def test_a_model_makes_do_with_the_threads_that_can_be_started(path: Path) -> None:
    result = subprocess.run(
        ["sh", "-c", 'ulimit -s 8192 && exec "$@"', "sh", sys.executable, "-c", WITHOUT_THREADS, str(path)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0 and not result.stderr, result.stderr
    threads, n_results, same = result.stdout.split()
    assert 1 < int(threads) < 8 and n_results == "2" and same == "True"


# ----------------------------------------------------------------------------
# What help() says, and the end of a model


def test_every_public_name_says_what_it_is_and_how_it_is_called() -> None:
    for kind in (Engine, Session):
        names = {name for name in vars(kind) if not name.startswith("_")}
        assert {"forward"} < names and ("rewind" in names) == (kind is Session)
        for name in names:
            value = vars(kind)[name]
            assert len(value.__doc__) > 20, name
            assert not callable(value) or "self" in inspect.signature(value).parameters, name
    for name in (
        "isa",
        "set_isa",
        "runnable_isas",
        "softmax",
        "log_sum_exp",
        "top_k",
        "quantize_tiles",
        "int8_peak",
    ):
        function = getattr(engine, name)
        assert inspect.signature(function) and len(function.__doc__) > 20, name
    assert str(inspect.signature(Engine.forward)) == "(self, batch, logits='last')"
    assert Engine.__doc__.startswith("Engine(path, threads=None, kv=")  # type: ignore[union-attr]


def test_a_session_says_how_full_it_is(path: Path, kv: KV) -> None:
    session = Engine(path, kv=kv).session(100)
    session.forward([1, 2, 3])
    assert repr(session) == f"<Session, 3 of 100 positions, {session.kv_bytes:,} bytes of KV cache>"


def test_wrong_calls_are_named_as_they_were_written(path: Path) -> None:
    model = Engine(path)
    with pytest.raises(TypeError, match=r"^Engine\(\) needs the path of a model.bin"):
        Engine()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="the model is open already"):
        model.__init__(path)  # type: ignore[misc]
    for wrong in ((), (None,), (path,)):
        with pytest.raises(TypeError, match=r"^a Session is made by Model.session\(\)$"):
            Session(*wrong)
    with pytest.raises(ValueError, match="the model was never opened"):
        Engine.__new__(Engine, path).session()  # type: ignore[call-arg]
    for thing, told in ((model, "open its path again"), (model.session(), r"fork\(\) makes a second one")):
        for operation in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=f"cannot be pickled or copied: .*{told}"):
                operation(thing)


@pytest.mark.parametrize("huge_pages", [False, True])
def test_a_closed_model_gives_its_memory_back_and_refuses_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, huge_pages: bool
) -> None:
    path = export_small_model(tmp_path)
    monkeypatch.setattr("qwen3c.engine.engine.in_huge_pages", lambda weights: memoryview(bytes(weights)))
    model = Engine(path, threads=2, huge_pages=huge_pages)
    session = model.session()
    session.forward([1, 2, 3])
    calls = {
        "forward": lambda: model.forward([(session, [1])]),
        "an empty forward": lambda: model.forward([]),
        "session": model.session,
        "trace": lambda: model.trace([1]),
        "logit_lens": lambda: model.logit_lens(np.zeros((1, 64))),
        "weight": lambda: model.weight("model.norm.weight"),
        "a session's forward": lambda: session.forward([1]),
        "fork": session.fork,
    }
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    model.close()
    model.close()
    assert model.closed and model.config.n_layers == 2 and model.metadata and model.path == str(path)
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()
    for name, call in calls.items():
        with pytest.raises(ValueError, match="the model is closed$"):
            pytest.fail(f"{name}: {call()}")  # type: ignore[operator]
    session.rewind(0)
    assert session.kv_bytes == 0


def test_closing_waits_for_the_pass_of_another_thread(
    path: Path, ids: np.ndarray, kv: KV, whole: np.ndarray
) -> None:
    for delay in (0, 0.001, 0.003, 0.01):
        model = Engine(path, threads=2, kv=kv)
        results: list[bool] = []

        def decode(session: Session, results: list[bool] = results) -> None:
            with contextlib.suppress(ValueError):
                for start in range(0, 600, 50):
                    logits = session.forward(ids[start : start + 50], "all")
                    results.append(np.array_equal(logits, whole[start : start + 50]))

        threads = [threading.Thread(target=decode, args=(model.session(),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(delay)
        model.close()
        for thread in threads:
            thread.join()
        assert all(results)


# ----------------------------------------------------------------------------
# Buffers and probes


@pytest.mark.parametrize("shape", [{}, EXPERTS | {"architecture": "qwen3_moe"}, {"head_dim": 128}], ids=str)
def test_the_estimate_of_the_buffers_is_what_the_engine_lays_out(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    config = ModelFile(export_small_model(tmp_path, **SHAPE | {"hidden_dim": 1024} | shape)).config
    for rows in (16, 256):
        estimate = memory.run_state_bytes(config, rows)
        fixed = engine.run_state_bytes(config, 0)  # the scratch of a thread, the experts' groups
        assert 0 <= engine.run_state_bytes(config, rows) - estimate <= fixed + 20 * 64
    threads = [engine.run_state_bytes(config, 1, threads) for threads in (1, 2, 3)]
    assert threads[2] - threads[1] == threads[1] - threads[0] > 4 * 16 * (256 + config.head_dim)


def test_buffers_of_a_batch_do_not_overlap(path: Path, ids: np.ndarray, kv: KV, whole: np.ndarray) -> None:
    """Buffers that grew row by row give the same results as buffers allocated at once."""
    model = Engine(path, threads=1, kv=kv)
    for n in (1, 2, 3, 5, 17, 250):
        assert np.array_equal(model.session().forward(ids[:n], "all"), whole[:n])


def test_a_trace_between_two_passes_changes_neither(
    path: Path, ids: np.ndarray, kv: KV, whole: np.ndarray
) -> None:
    for threads in (1, 2):
        model = Engine(path, threads=threads, kv=kv)
        session = model.session()
        for start in (0, 150, 300):
            assert np.array_equal(
                session.forward(ids[start : start + 150], "all"), whole[start : start + 150]
            )
            arrays = model.trace(ids[:290])
            assert np.array_equal(arrays["lm_head"], whole[:290])
            assert list(arrays) == [name for name, _, _ in probes.places(model.config)] + ["lm_head"]
            for name, layer, probe in probes.places(model.config):
                assert arrays[name].shape == probe.shape_of(model.config, 290), (layer, name)


# ----------------------------------------------------------------------------
# For the sampler


def test_softmax_agrees_with_float64(model: Engine) -> None:
    logits = np.random.default_rng(6).normal(0, 5, 1001).astype(np.float32)
    for temperature in (0.3, 1.0, 2.0):
        scaled = logits.astype(np.float64) / temperature
        exact = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
        # the argument is rounded to float32: |x| * 2^-24 of relative error in exp
        assert np.allclose(engine.softmax(logits, temperature), exact, rtol=2e-5, atol=1e-12)
    assert np.isclose(engine.log_sum_exp(logits), np.log(np.exp(logits.astype(np.float64)).sum()), atol=1e-6)


def test_softmax_gives_a_forbidden_token_no_chance() -> None:
    probabilities = engine.softmax(np.array([0.0, -np.inf, 1.0, -1e9], np.float32))
    assert probabilities[1] == 0 and probabilities[3] == 0


def test_top_k_orders_by_value_then_id() -> None:
    random = np.random.default_rng(7)
    for n in (1, 5, 64, 65, 1000, 151_936):
        logits = np.round(random.normal(0, 3, n), 2).astype(np.float32)
        order = np.lexsort((np.arange(n), -logits))
        for k in {1, min(20, n), min(64, n)}:
            assert np.array_equal(engine.top_k(logits, k), order[:k])


def test_kv_bytes_counts_a_shared_block_once_and_growth_foretells_it(path: Path, kv: KV) -> None:
    model = Engine(path, kv=kv)
    block, session = model.kv_block_bytes, model.session()
    assert model.kv_bytes == 0 and session.growth(1) == block
    session.forward([1] * 10)
    assert model.kv_bytes == block and session.growth(256 - 10) == 0 and session.growth(257 - 10) == block
    other = session.fork()
    assert model.kv_bytes == model.kv_bytes_of([session, other]) == block
    assert session.growth(1) == other.growth(1) == block  # the shared block would be copied
    other.forward([2])
    assert model.kv_bytes == model.kv_bytes_of([session, other]) == 2 * block
    assert session.growth(1) == 0 and model.kv_bytes_of([other]) == block
    other.rewind(0)
    assert model.kv_bytes == block
    del session
    assert model.kv_bytes == 0
