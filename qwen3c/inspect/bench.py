"""How fast a model.bin runs here, beside what the machine can do at most: `run.py model.bin -m bench`.

    pp512         a prompt of 512 tokens into an empty cache, for the logits of its last token
    tg64          64 tokens one by one, logits alone; tg64 @ d8192: from position 8192; tg64 x16:
                  16 sessions at once
    loop64        64 tokens as a user gets them: sampled, turned into text, checked for an end

Two limits hold for every test: a pass takes at least the time to read its weights, keys and values once, and
at least the time of its multiply-adds on registers alone. Both limits are measured between the tests, on the
same threads; "% of limit" is the longer of the two times as a share of the time the run took.
benchmarks/bench.py sets the same figures beside other engines.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import engine
from ..drivers.sampler import RECOMMENDED, Sampler, Sampling
from ..format import Config, Encodings, ModelFile, Tensor, label, tensors
from ..memory import ROWS, available, gib
from ..system.machine import cpu_name
from ..system.terminal import escaped, wrapped

if TYPE_CHECKING:
    from ..model import Model

PROBE_BYTES = 512 << 20  # read to measure the bandwidth: more than any cache holds
# standard deviation / median of the machine's limits, above which the figures prove nothing
NOISE = 0.05
CHECKED = (8, 4)  # tokens of prompt and reply that are compared with the reference before anything is timed
# the tests of run.py -m bench: kind, tokens, description
QUICK = (
    ("pp", 512, "reading a prompt of {n} tokens in one go"),
    ("tg", 64, "{n} tokens one after the other, the engine alone"),
    ("loop", 64, "{n} tokens as a chat gets them: sampled and turned into text"),
)
# each test is repeated for so many seconds, but at least and at most so often
QUICK_SECONDS, QUICK_RUNS = (5.0, (2, 5))
CHAT: dict[str, Any] = {**RECOMMENDED[False], "seed": 1}


# ----------------------------------------------------------------------------
# What is measured, and what it asks of the machine


@dataclass(frozen=True)
class Test:
    """A test: n tokens of each of `batch` sequences, from position `depth` on."""

    # pp, tg, loop; or mix: n tokens of a prompt in one pass with one token of each of `batch` other sequences
    kind: str
    n: int
    depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        deep = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.n}{deep}" + (f" x{self.batch}" if self.batch > 1 else "")

    @property
    def tokens(self) -> int:
        return self.n * self.batch


@dataclass(frozen=True)
class Work:
    """The least a test can do: bytes read from memory, and multiply-adds."""

    bytes: float
    multiply_adds: float

    def seconds(self, bandwidth: float, peak: float) -> float:
        """The shortest time on a machine. bandwidth: bytes per second. peak: multiply-adds per second."""
        return max(self.bytes / bandwidth, self.multiply_adds / peak)


def work(config: Config, kv: str, test: Test, encodings: Encodings | None = None) -> Work:
    """The Work of a test: weights are read once a pass, keys and values once a pass and sequence.

    encodings: of the matrices, as in ModelFile; None for INT8.
    """
    rows = min(test.n, ROWS) if test.kind == "pp" else test.batch
    # (first, end) positions of each pass; of a prompt only the last pass computes logits
    if test.kind == "pp":
        passes = [(start, min(start + ROWS, test.n)) for start in range(0, test.n, ROWS)]
        heads = 1
    else:
        passes = [(i, i + 1) for i in range(test.n)]
        heads = test.n
    reached = sum(test.depth + end for _, end in passes)
    seen = test.n * test.depth + test.n * (test.n + 1) // 2
    body, head = weight_bytes(config, rows, encodings)
    n_bytes = len(passes) * body + heads * head + test.batch * reached * config.kv_bytes_per_token(kv)
    of_body, of_head = multiply_adds(config)
    products = test.n * of_body + heads * of_head + 2 * config.n_layers * config.q_dim * seen
    return Work(n_bytes, test.batch * products)


def weight_bytes(config: Config, rows: int, encodings: Encodings | None = None) -> tuple[float, float]:
    """Bytes of weights that a pass of `rows` rows reads: in the layers, and for the logits.

    Experts count as often as `rows` rows choose them on average, if every choice is equally likely.
    """
    *body, head = tensors(config, encodings)
    return sum(tensor.size * _share_read(config, tensor, rows) for tensor in body), float(head.size)


def _share_read(config: Config, tensor: Tensor, rows: int) -> float:
    if ".experts." in tensor.name:
        return 1 - (1 - config.n_experts_per_token / config.n_experts) ** rows
    # an embedding that is not also the head: one row is read for each token
    if tensor.name.startswith("model.embed_tokens"):
        return min(1.0, rows / config.vocab_size)
    return 1.0


def multiply_adds(config: Config) -> tuple[int, int]:
    """Multiply-adds of the matrices for one row: (in the layers, for the logits)."""
    *body, head = tensors(config)
    of_body = 0.0
    for tensor in body:
        if len(tensor.shape) == 2 and not tensor.name.startswith("model.embed_tokens"):
            active = config.n_experts_per_token / config.n_experts if ".experts." in tensor.name else 1
            of_body += active * math.prod(tensor.shape)
    return round(of_body), math.prod(head.shape)


# ----------------------------------------------------------------------------
# Our side: the tests on a model


class Player:
    """Runs tests on a model. Sessions are kept from run to run, so that a depth is paid for once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        # the tokenizer loads in the background: wait, so that the tests do not time it and memory includes it
        _ = model.tokenizer
        self._sessions: list[engine.Session] = []
        self._depth = 0

    @property
    def kv_bytes(self) -> int:
        return sum(session.kv_bytes for session in self._sessions)

    def seconds(self, test: Test, seed: int) -> float:
        """How long `test` takes with random tokens. ValueError if it passes the model's context."""
        if test.depth + test.n > self.model.config.context:
            needed = test.depth + test.n
            raise ValueError(
                f"{test.name} needs {needed} positions, the model has {self.model.config.context}"
            )
        random = np.random.default_rng(seed)
        ids = random.integers(0, self.model.config.n_tokens, (test.batch, test.n), np.int32)
        if test.kind == "loop":
            return self._loop(test.n, ids[0, :1].tolist())
        if test.kind == "mix":
            *decoding, reading = self._at(test.depth, test.batch + 1)
            return self._pass([*zip(decoding, ids[:, :1], strict=True), (reading, ids[0])])
        sessions = self._at(test.depth, test.batch)
        if test.kind == "pp":
            return self._pass(list(zip(sessions, ids, strict=True)))
        begin = time.perf_counter()
        for i in range(test.n):
            self.model.forward(list(zip(sessions, ids[:, i : i + 1], strict=True)))
        return time.perf_counter() - begin

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n most likely tokens after `ids`, each after those before it."""
        return greedy(self.model, ids, n)

    def _pass(self, batch: list[tuple[engine.Session, Any]]) -> float:
        begin = time.perf_counter()
        self.model.forward(batch)
        return time.perf_counter() - begin

    def _at(self, depth: int, batch: int) -> list[engine.Session]:
        """`batch` sessions at position `depth`, filled with random tokens."""
        if len(self._sessions) != batch or self._depth != depth:
            self._sessions, self._depth = [self.model.session() for _ in range(batch)], depth
            for i, session in enumerate(self._sessions):
                if depth:
                    past = np.random.default_rng(i).integers(0, self.model.config.n_tokens, depth, np.int32)
                    session.forward(past, "hidden")
        for session in self._sessions:
            session.rewind(depth)
        return self._sessions

    def _loop(self, n: int, prompt: list[int]) -> float:
        # end tokens are never sampled, or the loop could end early
        never = dict.fromkeys(self.model.metadata["eos_token_ids"], -1e4)
        reply = self.model.generate(prompt, n + 1, draft=False, logit_bias=never, **CHAT)
        for _ in reply:
            pass
        return reply.stats.decode_seconds


def greedy(model: Model, ids: Sequence[int], n: int) -> list[int]:
    """The n most likely tokens after `ids`, each after those before it; none of them ends the text."""
    never = dict.fromkeys(model.metadata["eos_token_ids"], -1e4)
    reply = model.generate(ids, n, draft=False, temperature=0, logit_bias=never)
    return [event.token for event in reply if event.token is not None]


def sampler_seconds(sampling: dict[str, Any], n_tokens: int, times: int = 50) -> float:
    """Median seconds to sample one token from n_tokens logits."""
    logits = np.random.default_rng(0).standard_normal(n_tokens, np.float32) * 4
    sampler = Sampler(Sampling(**sampling), [], n_tokens)
    sampler.sample(logits)
    begin = time.perf_counter()
    for _ in range(times):
        sampler.sample(logits)
    return (time.perf_counter() - begin) / times


# ----------------------------------------------------------------------------
# Before anything is timed: is it right?


def check_bits(model: Model) -> str:
    """Compare logits with those of the scalar kernels; says what was compared. RuntimeError if one bit
    differs.
    """
    n_prompt, n_reply = CHECKED
    prompt = np.random.default_rng(0).integers(0, model.config.n_tokens, n_prompt, np.int32)
    isa = engine.isa()
    ours = greedy(model, prompt.tolist(), n_reply), model.session().forward(prompt, "all")
    engine.set_isa("scalar")
    try:
        expected = greedy(model, prompt.tolist(), n_reply), model.session().forward(prompt, "all")
    finally:
        engine.set_isa(isa)
    if ours[0] != expected[0] or ours[1].tobytes() != expected[1].tobytes():
        raise RuntimeError(f"the kernels of {isa} and the scalar ones give different logits")
    return (
        f"{n_prompt} tokens and {n_reply} chosen greedily: the logits of {isa} are the scalar kernels', bit "
        "for bit"
    )


def check_reference(path: str, threads: int) -> str:
    """Compare greedy tokens with the NumPy reference; says what was compared, or why nothing was.

    RuntimeError if a token differs.
    """
    from .. import reference
    from ..model import Model

    file = ModelFile(path)
    config, (n_prompt, n_reply) = file.config, CHECKED
    needed, free = 8 * config.n_parameters, available()
    if free is not None and needed > free:
        return f"the NumPy reference needs {gib(needed)}, {gib(free)} are available: not compared"
    ids = np.random.default_rng(0).integers(0, config.n_tokens, n_prompt, np.int32).tolist()
    ours = greedy(Model(path, threads, "f32", "float32"), ids, n_reply)
    weights = reference.load_weights(file)
    for expected in ours:
        logits = reference.forward(config, weights, ids)[-1, : config.n_tokens]
        if int(logits.argmax()) != expected:
            raise RuntimeError(
                f"after {ids} the NumPy reference has token {logits.argmax()}, the engine {expected}"
            )
        ids.append(expected)
    return f"{n_reply} tokens chosen greedily, float32 activations: those of the NumPy reference"


# ----------------------------------------------------------------------------
# The machine's limits


class Machine:
    """The machine's limits, bytes read and int8 multiply-adds per second: one value for each measure()."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        free = available()
        self._memory = np.ones(min(PROBE_BYTES, free // 4 if free else PROBE_BYTES), np.int8)
        self.bandwidth: list[float] = []
        self.peak: list[float] = []

    def measure(self) -> None:
        self.bandwidth.append(engine.read_bandwidth(self._memory, self.threads))
        self.peak.append(engine.int8_peak(self.threads))


def spread(values: Sequence[float]) -> float:
    """Standard deviation as a share of the median."""
    return statistics.stdev(values) / statistics.median(values) if len(values) > 1 else 0.0


def verdict(bandwidth: Sequence[float], peak: Sequence[float]) -> str:
    """Says whether the machine was quiet enough: whether its limits varied by little."""
    reads, sums = spread(bandwidth), spread(peak)
    limits = (
        f"read bandwidth {statistics.median(bandwidth) / 1e9:.1f} GB/s ± {reads:.0%}, "
        f"int8 peak {statistics.median(peak) / 1e9:.1f} G MAC/s ± {sums:.0%}"
    )
    if max(reads, sums) > NOISE:
        return f"{limits}: TOO NOISY TO JUDGE, the machine's own figures vary by more than {NOISE:.0%}"
    return f"{limits}: quiet enough to judge"


# ----------------------------------------------------------------------------
# The report


@dataclass
class Series:
    """One engine's runs of one test, and the machine's limits beside each run."""

    engine: str
    test: Test
    seconds: list[float] = field(default_factory=list)
    bandwidth: list[float] = field(default_factory=list)  # bytes per second
    peak: list[float] = field(default_factory=list)  # multiply-adds per second
    work: Work | None = None  # None for a peer, whose weights have another form

    @property
    def rates(self) -> list[float]:
        """Tokens per second."""
        return [self.test.tokens / seconds for seconds in self.seconds]

    @property
    def shares(self) -> list[float]:
        """The share of the limit that each run reached."""
        if self.work is None:
            return []
        runs = zip(self.seconds, self.bandwidth, self.peak, strict=True)
        return [self.work.seconds(bandwidth, peak) / seconds for seconds, bandwidth, peak in runs]

    def cells(self) -> list[str]:
        """The cells of a row: test, t/s, GB/s, G MAC/s, % of limit."""
        rate = f"{statistics.median(self.rates):.2f} ± {_sigma(self.rates):.2f}"
        if self.work is None:
            return [self.test.name, rate, "", "", ""]
        seconds = statistics.median(self.seconds)
        figures = f"{self.work.bytes / seconds / 1e9:.2f}", f"{self.work.multiply_adds / seconds / 1e9:.2f}"
        return [self.test.name, rate, *figures, f"{statistics.median(self.shares):.0%}"]

    def as_json(self) -> dict[str, Any]:
        result = {
            "engine": self.engine, "test": self.test.name, "kind": self.test.kind, "n": self.test.n,
            "depth": self.test.depth, "batch": self.test.batch, "seconds": self.seconds,
            "tokens_per_second": statistics.median(self.rates), "sigma": _sigma(self.rates),
            "bandwidth": self.bandwidth, "int8_peak": self.peak,
        }  # fmt: skip
        if self.work is not None:
            result |= {"bytes": self.work.bytes, "multiply_adds": self.work.multiply_adds}
            result["share_of_limit"] = statistics.median(self.shares)
        return result


COLUMNS = ("test", "t/s", "GB/s", "G MAC/s", "% of limit")
COLUMN_WORDS = (  # legend of the columns after the first
    "tokens per second, the median of the runs ± their standard deviation",
    "bytes of weights, keys and values read from memory",
    "multiplications and additions, in billions a second",
    "how near that is to the most that memory or arithmetic here allow",
)


def _sigma(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def model_cells(file: ModelFile) -> list[str]:
    """The cells model, size and params, as llama-bench prints them."""
    config = file.config
    return [
        f"{escaped(str(file.metadata['name']))} {label(config, file.encodings)}",
        gib(file.file_size),
        f"{config.n_parameters / 1e6:.2f} M",
    ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table with aligned columns, numbers to the right."""
    rows = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(header))]
    yield _line(header, widths, right)
    yield (
        "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    )
    for row in rows:
        yield _line(row, widths, right)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
    return "| " + " | ".join(padded) + " |"


# ----------------------------------------------------------------------------
# run.py -m bench


def quick(model: Model, doing: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """Lines that fit 80 columns: the short benchmark, about 20 seconds for 0.6 billion parameters.

    doing: called before each step with its description.
    """
    threads = "thread" if model.threads == 1 else "threads"
    yield from wrapped(", ".join(model_cells(model.file)) + " parameters")
    yield from wrapped(f"{cpu_name()}, {model.threads} {threads}, {engine.isa()}, KV {model.kv}")
    doing("comparing a few tokens with the scalar kernels")
    yield from wrapped(check_bits(model))
    player, machine, results, legend = Player(model), Machine(model.threads), [], []
    for kind, n, words in QUICK:
        test = Test(kind, min(n, model.config.context - 2))
        results.append(_repeat(player, machine, test, doing))
        legend.append((test.name, words.format(n=test.n)))
    yield ""
    yield from markdown(COLUMNS, (series.cells() for series in results))
    yield ""
    for name, words in [*legend, *zip(COLUMNS[1:], COLUMN_WORDS, strict=True)]:
        yield from wrapped(f"{name:<11} {words}", indent=12)
    yield ""
    yield from wrapped(verdict(machine.bandwidth, machine.peak))


def _repeat(player: Player, machine: Machine, test: Test, doing: Callable[[str], None]) -> Series:
    encodings = player.model.file.encodings
    series = Series("qwen3c", test, work=work(player.model.config, player.model.kv, test, encodings))
    doing(f"{test.name}: warming up")
    player.seconds(test, 0)  # warm-up: touches pages and allocates buffers, not counted
    least, most = QUICK_RUNS
    while len(series.seconds) < least or (len(series.seconds) < most and sum(series.seconds) < QUICK_SECONDS):
        doing(f"{test.name}: run {len(series.seconds) + 1} of at most {most}")
        series.seconds.append(player.seconds(test, len(series.seconds) + 1))
        machine.measure()
        series.bandwidth.append(machine.bandwidth[-1])
        series.peak.append(machine.peak[-1])
    return series
