"""The benchmark: qwen3c beside other engines and beside the machine's limits, paired in one run.

    python benchmarks/bench.py                                    # random weights in the shape of Qwen3-0.6B
    python benchmarks/bench.py path/to/Qwen3-0.6B --against llama.cpp,openvino
    python benchmarks/bench.py --size 4B --tests pp,tg --threads 1,2 --json 4B.json --pictures pictures

All engines get the same weights and tokens, the same threads and the same type of KV cache. Each runs in
a process of its own. They take turns, so that what else happens on the machine happens to all: believe the
ratios, which are taken pair by pair. The first round is not counted.
Beside every pair the machine's own limits are measured, on the same threads; if they vary, the report says
that it proves nothing. Before anything is timed, our logits must equal the scalar kernels' to the bit, and
our greedy tokens the NumPy reference's.

    pp, tg        a prompt of --prompts tokens; --decode tokens one by one; loop: as users get them
    depth         pp and tg from position --depths on
    batch         --batches sessions that decode together
    mixed         one pass that reads a prompt and decodes a token of other sessions, against both apart
    neighbour     what is left of pp and tg while another process spins on one of our cores
    load          seconds from the start of a process to its first token, the file being cached
    memory        resident after all that, mapped weights included
    export        source bytes a second, the source being cached
    sampler       one token of 151,936 logits

Figures are medians, ± one standard deviation. Columns as in llama-bench, and: GB/s, weights and KV cache
read; G MAC/s, multiply-adds of matrices and attention; % of limit, see qwen3c/inspect/bench.py.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from engines import PEERS, WORKER, Contender, Setting, convert, environment, last_line, require_peers
from random_model import SIZES, write_random_model

from qwen3c import Model, engine
from qwen3c.convert.export import export
from qwen3c.format import ModelFile
from qwen3c.inspect import bench
from qwen3c.inspect.bench import CHAT, COLUMNS, Machine, Series, Test
from qwen3c.memory import ROWS
from qwen3c.system.machine import cpu_name, default_threads

OURS = "qwen3c"
TESTS = ("pp", "tg", "depth", "batch", "mixed", "neighbour", "load", "memory", "export", "sampler")
SAMPLED_TOKENS = 151936  # the vocabulary of Qwen3
AGREEING = 8  # tokens of the prompts that every engine continues, to check that all run the same model
PROMPT = "The first word of"

# ends with its parent, even one that is killed
SPIN = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
parent = os.getppid()
print("spinning", flush=True)
while os.getppid() == parent:
    pass
"""

RUN_OURS = "from qwen3c.cli.run import main; raise SystemExit(main())"

PLACES = ("--python", "--work", "--json", "--pictures")  # options about paths, which a report leaves out


# ----------------------------------------------------------------------------
# Models


def source_of(args: argparse.Namespace, work: Path) -> Path:
    """The Hugging Face directory: the one given, or random weights (kept if --work has them)."""
    if args.source is not None:
        return args.source
    source = work / f"random-{args.size}"
    if not (source / "model.safetensors").exists():
        note(f"writing random weights of {args.size}")
        write_random_model(source, SIZES[args.size])
    return source


def source_bytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


# ----------------------------------------------------------------------------
# The race


@dataclass
class Figure:
    """A measurement without tokens per second: values of one engine, in a unit."""

    what: str
    engine: str
    unit: str
    values: list[float]

    def cells(self) -> list[str]:
        sigma = statistics.stdev(self.values) if len(self.values) > 1 else 0.0
        return [self.what, self.engine, f"{statistics.median(self.values):.3g} ± {sigma:.2g}", self.unit]


@dataclass
class Race:
    """Everything measured with one setting."""

    setting: Setting
    engines: dict[str, str] = field(default_factory=dict)  # name -> version and settings
    checks: list[str] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what an engine could not do


def tests_of(args: argparse.Namespace) -> list[Test]:
    tests = [Test("pp", n) for n in args.prompts] if "pp" in args.tests else []
    if "tg" in args.tests:
        tests += [Test("tg", args.decode), Test("loop", args.decode)]
    if "batch" in args.tests:
        tests += [Test("tg", args.decode, batch=batch) for batch in args.batches if batch > 1]
    if "depth" in args.tests:
        for depth in args.depths:
            tests += [Test("tg", args.decode, depth), Test("pp", args.prompts[0], depth)]
    return tests


def neighbour_tests(args: argparse.Namespace) -> list[Test]:
    return [Test("pp", args.prompts[0]), Test("tg", args.decode)] if "neighbour" in args.tests else []


def run_setting(
    args: argparse.Namespace, race: Race, models: dict[str, Path], keep: Callable[[], None]
) -> None:
    """Fill `race` for its setting; `keep` is called whenever it has grown."""
    setting = race.setting
    note(f"checking: {setting.threads} threads, KV {setting.kv}")
    race.checks.append(bench.check_bits(Model(str(models[OURS]), setting.threads, setting.kv)))  # type: ignore[arg-type]
    race.checks.append(bench.check_reference(str(models[OURS]), setting.threads))
    contenders = []
    for name, path in models.items():
        try:
            contenders.append(Contender(name, args.python.get(name, sys.executable), path, setting))
            race.engines[name] = contenders[-1].settings
        except ValueError as error:
            race.missing.append(str(error))
    race.checks += agreement(contenders, ModelFile(models[OURS]).config.n_tokens)
    machine, file = Machine(setting.threads), ModelFile(models[OURS])
    for test in tests_of(args):
        note(f"{test.name}, {args.pairs} pairs")
        able = [contender for contender in contenders if test.kind != "loop" or contender.name == OURS]
        taken = take_turns(args.pairs, able, machine, test, race.missing)
        for series in taken:
            if series.engine == OURS:
                series.work = bench.work(file.config, setting.kv, test, file.encodings)
        race.series += taken
        keep()
    if "mixed" in args.tests:
        race.figures += mixed(args.pairs, contenders[0], max(args.batches), file.config.context)
    for test in neighbour_tests(args):
        race.figures += [beside_neighbour(args.pairs, contender, test) for contender in contenders]
    if "memory" in args.tests:
        race.figures += memory(contenders)
    for contender in contenders:
        contender.close()
    if "load" in args.tests:
        race.figures += load(args, setting, {name: models[name] for name in race.engines})
    keep()


def agreement(contenders: Sequence[Contender], n_tokens: int) -> list[str]:
    """How many greedy tokens a peer shares with us: many, as it runs the same model, but not all, as it
    rounds otherwise.
    """
    prompts = np.random.default_rng(1).integers(0, n_tokens, (AGREEING, AGREEING)).tolist()
    ours, *theirs = ([contender.greedy(ids, 1) for ids in prompts] for contender in contenders)
    return [
        f"{peer.name} prefers our token after {sum(a == b for a, b in zip(ours, chosen, strict=True))} "
        f"of {AGREEING} random prompts"
        for peer, chosen in zip(contenders[1:], theirs, strict=True)
    ]


def take_turns(
    pairs: int, contenders: Sequence[Contender], machine: Machine, test: Test, missing: list[str]
) -> list[Series]:
    """One Series for each engine that can do the test, in alternating order, after an uncounted round."""
    series = {contender.name: Series(contender.name, test) for contender in contenders}
    for i in range(-1, pairs):
        taken = {}
        for contender in contenders if i % 2 else contenders[::-1]:
            if contender.name not in series:
                continue
            try:
                taken[contender.name] = contender.seconds(test, seed=i + 1)
            except ValueError as error:
                missing.append(f"{test.name}: {error}")
                del series[contender.name]
        if i < 0:
            continue
        machine.measure()
        for name, seconds in taken.items():
            series[name].seconds.append(seconds)
            series[name].bandwidth.append(machine.bandwidth[-1])
            series[name].peak.append(machine.peak[-1])
    return list(series.values())


def mixed(pairs: int, ours: Contender, sessions: int, context: int) -> list[Figure]:
    """The time of a full pass (rows of a prompt and one row of each session) against two separate passes."""
    sessions = min(sessions, ROWS // 2)
    together = Test("mix", min(ROWS - sessions, context), batch=sessions)
    apart = Test("pp", together.n), Test("tg", 1, batch=sessions)
    note(f"mixed, {pairs} pairs")

    def measure() -> float:
        return 100 * ours.seconds(together, 0) / sum(ours.seconds(test, 0) for test in apart)

    what = f"a pass of {together.n} rows of a prompt and {sessions} that decode"
    return [Figure(what, OURS, "% of both apart", repeat(pairs, measure))]


def beside_neighbour(pairs: int, contender: Contender, test: Test) -> Figure:
    note(f"{test.name} of {contender.name} beside a neighbour, {pairs} pairs")

    def measure() -> float:
        quiet = contender.seconds(test, 0)
        with neighbour():
            return 100 * quiet / contender.seconds(test, 0)

    what = f"{test.name} beside a neighbour"
    return Figure(what, contender.name, "% of the quiet rate", repeat(pairs, measure))


@contextlib.contextmanager
def neighbour() -> Iterator[int]:
    """Within, another process spins on one of our cores; yields its process id."""
    with subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()  # wait until it spins
            yield process.pid
        finally:
            process.kill()


def memory(contenders: Sequence[Contender]) -> list[Figure]:
    figures = []
    for contender in contenders:
        resident, kv = contender.memory()
        figures.append(Figure("resident", contender.name, "MB", [resident / 1e6]))
        if contender.name == OURS:
            rest = resident - kv - contender.path.stat().st_size
            figures.append(Figure("resident beyond file and KV cache", OURS, "MB", [rest / 1e6]))
    return figures


def load(args: argparse.Namespace, setting: Setting, models: dict[str, Path]) -> list[Figure]:
    """Seconds from the start of a process to the first token it prints."""
    note(f"load, {args.pairs} pairs")
    threads = ["-j", str(setting.threads), "--kv", setting.kv]
    text = [
        sys.executable,
        "-c",
        RUN_OURS,
        str(models[OURS]),
        "-m",
        "generate",
        "-i",
        PROMPT,
        "-n",
        "1",
        "--json",
    ]
    commands = {("first token, text to text", OURS): [*text, *threads]}
    for name, path in models.items():
        python = args.python.get(name, sys.executable)
        command = [python, str(WORKER), "first", name, str(path), json.dumps(asdict(setting))]
        commands["first token, ids to id", name] = command
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in commands}
    for i in range(-1, args.pairs):
        for key, command in commands.items() if i % 2 else reversed(commands.items()):
            taken = seconds_to_first_byte(command)
            if i >= 0:
                seconds[key].append(taken)
    return [Figure(what, name, "s", values) for (what, name), values in seconds.items()]


def seconds_to_first_byte(command: Sequence[str]) -> float:
    start = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment()) as process:
        assert process.stdout and process.stderr
        if not process.stdout.read(1):
            raise RuntimeError(last_line(process.stderr.read().decode()))
        seconds = time.perf_counter() - start
        process.communicate()
    return seconds


def repeat(pairs: int, measure: Callable[[], float]) -> list[float]:
    """Call for one value per pair; the first call is not counted."""
    return [measure() for _ in range(pairs + 1)][1:]


def sampler(pairs: int) -> list[Figure]:
    kinds = {"greedy": {"temperature": 0}, "temperature 0.7, top-p 0.8, top-k 20": CHAT}
    return [
        Figure(f"sampler, {what}", OURS, "ms",
               repeat(pairs, lambda s=s: 1e3 * bench.sampler_seconds(s, SAMPLED_TOKENS)))  # type: ignore[misc]
        for what, s in kinds.items()
    ]  # fmt: skip


def export_rates(pairs: int, source: Path, target: Path, group_size: int) -> list[Figure]:
    def measure() -> float:
        begin = time.perf_counter()
        export(source, target, group_size=group_size)
        return source_bytes(source) / (time.perf_counter() - begin) / 1e9

    note(f"export, {pairs} times")
    return [Figure("export", OURS, "GB of source a second", repeat(pairs, measure))]


# ----------------------------------------------------------------------------
# The report


def report(file: ModelFile, races: Sequence[Race], figures: Sequence[Figure]) -> Iterable[str]:
    """Markdown."""
    yield f"{cpu_name()}, {engine.isa()}; load at the end {os.getloadavg()[0]:.1f}"
    rows = [row for race in races for row in rows_of(file, race)]
    ratio = ["qwen3c is faster by"] if any(len(race.engines) > 1 for race in races) else []
    for race in races:
        yield ""
        yield f"{race.setting.threads} threads, KV {race.setting.kv}"
        yield from (f"- {name}: {settings}" for name, settings in race.engines.items())
        yield from (f"- {line}" for line in race.checks)
        yield from (f"- left out: {line}" for line in race.missing)
    if rows:
        yield ""
        header = ("model", "size", "params", "engine", "threads", "KV", *COLUMNS, *ratio)
        yield from bench.markdown(header, [row[: len(header)] for row in rows])
    others = [(race, figure) for race in races for figure in race.figures]
    if others or figures:
        yield ""
        cells = [[*figure.cells(), str(race.setting.threads), race.setting.kv] for race, figure in others]
        cells += [[*figure.cells(), "", ""] for figure in figures]
        yield from bench.markdown(("what", "engine", "value", "unit", "threads", "KV"), cells)
    for race in races:
        if race.series:
            yield ""
            yield f"{race.setting.threads} threads, KV {race.setting.kv}: {verdict(race)}"


def rows_of(file: ModelFile, race: Race) -> list[list[str]]:
    ours = {series.test: series for series in race.series if series.engine == OURS}
    setting = [str(race.setting.threads), race.setting.kv]
    return [
        [
            *bench.model_cells(file),
            series.engine,
            *setting,
            *series.cells(),
            ratio(ours.get(series.test), series),
        ]
        for series in race.series
    ]


def ratio(ours: Series | None, theirs: Series) -> str:
    """How many times as fast we are, pair by pair: median (smallest to largest)."""
    if ours is None or ours is theirs:
        return ""
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def verdict(race: Race) -> str:
    # the engines of a pair share the limits measured beside it: take those of one
    series = [s for s in race.series if s.engine == race.series[0].engine]
    return bench.verdict([x for s in series for x in s.bandwidth], [x for s in series for x in s.peak])


def command_line(words: Sequence[str]) -> str:
    """The command that repeats a run on any machine: `words` without the options about paths."""
    kept, values = [], iter(words)
    for word in values:
        name, _, value = word.partition("=")
        if name not in PLACES:
            kept.append(word)
        elif not value:
            next(values, None)
    return shlex.join(["python", "benchmarks/bench.py", *kept])


def as_json(
    command: str, file: ModelFile, races: Sequence[Race], figures: Sequence[Figure]
) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(), "command": command,
        "machine": {"cpu": cpu_name(), "isa": engine.isa(), "load": os.getloadavg()[0]},
        "model": {
            "name": file.metadata["name"], "bytes": file.file_size,
            "parameters": file.config.n_parameters, "group_size": file.config.group_size,
        },
        "races": [
            {
                **asdict(race.setting), "engines": race.engines, "checks": race.checks,
                "missing": race.missing,
                "results": [series.as_json() for series in race.series],
                "figures": [asdict(figure) for figure in race.figures],
                "verdict": verdict(race) if race.series else None,
            }
            for race in races
        ],
        "figures": [asdict(figure) for figure in figures],
    }  # fmt: skip


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    source = source_of(args, work)
    ours = work / f"{source.resolve().name}-{args.group_size}.bin"
    figures: list[Figure] = []
    if "export" in args.tests:
        figures += export_rates(args.pairs, source, ours, args.group_size)
    else:
        note(f"exporting {source.name}")
        export(source, ours, group_size=args.group_size)
    file, tests = ModelFile(ours), tests_of(args)
    longest = max((test.depth + test.n for test in tests + neighbour_tests(args)), default=AGREEING)
    if longest > file.config.context:
        raise ValueError(f"{longest} positions are needed, the model has {file.config.context}")
    for kv in args.kv:
        engine.Engine(str(ours), 1, kv)  # ValueError if there is no such type of cache
    context = -(-max(longest + 1, 2 * AGREEING) // 256) * 256
    if "sampler" in args.tests:
        figures += sampler(args.pairs)
    models = {OURS: ours} | {name: convert(name, args.python, source, work) for name in args.against}
    batch = max((test.batch for test in tests), default=1)
    races: list[Race] = []

    def keep() -> None:  # what has been measured, whatever comes next
        if args.json:
            args.json.write_text(json.dumps(as_json(args.command, file, races, figures), indent=1) + "\n")

    for kv in args.kv:
        for threads in args.threads:
            races.append(Race(Setting(threads, kv, context, batch, args.huge_pages)))
            run_setting(args, races[-1], models, keep)
    print(*report(file, races, figures), sep="\n")
    if args.pictures:
        from pictures import draw

        draw(as_json(args.command, file, races, figures), args.pictures)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.isa:
            engine.set_isa(args.isa)
        # name missing peers before anything is made
        require_peers(args.against, args.python)
        if args.pictures:
            import pictures  # noqa: F401
        with tempfile.TemporaryDirectory() as temporary:
            run(args, args.work or Path(temporary))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[int]:
    values = [int(word) for word in words(text)]
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not numbers from 1 on, such as 1,2")
    return values


def assignment(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=PATH")
    return name, path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="MODEL_DIR", type=Path, nargs="?", help="Hugging Face directory (default: random)")
    add("--size", default="0.6B", choices=SIZES, help="of the random model (default: 0.6B)")
    add(
        "--tests",
        type=words,
        default=list(TESTS),
        metavar="NAMES",
        help=f"of {','.join(TESTS)} (default: all)",
    )
    add("--against", type=words, default=[], metavar="PEERS", help=f"of {','.join(PEERS)} (default: none)")
    add("--python", type=assignment, action="append", default=[], metavar="PEER=PATH",
        help="the Python that has a peer, where it is not this one")  # fmt: skip
    add(
        "--threads",
        type=numbers,
        default=[default_threads()],
        metavar="N,..",
        help="default: what this machine can feed",
    )
    add("--kv", type=words, default=["f16"], metavar="TYPES", help="types of the KV cache (default: f16)")
    add("--prompts", type=numbers, default=[512], metavar="N,..", help="tokens of the prompts (default: 512)")
    add("--decode", type=int, default=64, metavar="N", help="tokens decoded (default: 64)")
    add("--depths", type=numbers, default=[4096], metavar="N,..", help="default: 4096")
    add("--batches", type=numbers, default=[4, 16], metavar="N,..", help="default: 4,16")
    add("--pairs", type=int, default=5, metavar="N", help="measurements of each kind (default: 5)")
    add(
        "--huge-pages",
        action="store_true",
        help="our weights in memory of large pages, as run.py --huge-pages",
    )
    add("--isa", help="instruction set of ours (default: the widest here)")
    add("--group-size", type=int, default=64, metavar="N", help="of our file (default: 64)")
    add("--work", metavar="DIR", type=Path, help="keep the converted models here (default: a temporary one)")
    add("--json", metavar="FILE", type=Path, help="write every single value")
    add("--pictures", metavar="DIR", type=Path, help="draw: roofline, tokens/s by depth, batch, threads")
    args = parser.parse_args(argv)
    args.python = dict(args.python)
    args.command = command_line(sys.argv[1:] if argv is None else argv)
    for name in args.tests:
        if name not in TESTS:
            parser.error(f"there is no test {name!r}; known: {', '.join(TESTS)}")
    for name in ("decode", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, at least 1 is needed")
    return args


if __name__ == "__main__":
    sys.exit(main())
