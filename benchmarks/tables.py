"""Figures of docs/speed/*.json -> the tables of docs/SPEED.md and the line of speed in README.md.

    python benchmarks/bench.py --against llama.cpp,openvino,ctranslate2 --json docs/speed/0.6B.json
    python benchmarks/tables.py            # writes both documents; --check: are they up to date?

A document has a place for each table, between `<!-- speed NAME -->` and `<!-- end -->`; NAME is the JSON
file's, or `line`, which is one sentence made of 0.6B.json. The text of a place is made from the JSON alone,
so two places cannot contradict each other.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("docs/SPEED.md", "README.md")
PLACE = re.compile(r"(<!-- speed (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "qwen3c"
LINE, LINE_FROM = "line", "0.6B"  # the place of the one sentence, and whose figures it has

Report = dict[str, Any]  # what bench.py --json writes
Results = dict[str, dict[str, Any]]  # engine -> its result of one test


# ----------------------------------------------------------------------------
# One test


def what(result: dict[str, Any]) -> str:
    """A test in words, such as "decode at position 8,192, 4 sessions together"."""
    n, depth, batch = (result[key] for key in ("n", "depth", "batch"))
    words = {"pp": f"prefill of {n:,}", "tg": "decode", "loop": "decode, the whole token loop"}[
        result["kind"]
    ]
    words += f" at position {depth:,}" if depth else ""
    return words + (f", {batch} sessions together" if batch > 1 else "")


def rate(tokens_per_second: float) -> str:
    """At least three digits: 1,160 or 70.1 or 6.45."""
    digits = 0 if tokens_per_second >= 100 else 1 if tokens_per_second >= 10 else 2
    return f"{tokens_per_second:,.{digits}f}"


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """How many times as fast qwen3c is, pair by pair."""
    return [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]


def by_test(race: dict[str, Any]) -> list[Results]:
    """The results of a race, those of one test together, in the order in which they were measured."""
    found: dict[str, Results] = {}
    for result in race["results"]:
        found.setdefault(result["test"], {})[result["engine"]] = result
    return [results for results in found.values() if OURS in results]


# ----------------------------------------------------------------------------
# A table


def table(report: Report) -> Iterator[str]:
    """Lines of Markdown: machine and command, then a table for each number of threads and KV type."""
    machine, model = report["machine"], report["model"]
    yield (
        f"{model['name']}, {model['parameters'] / 1e6:,.0f} M parameters, groups of {model['group_size']}; "
        f"{machine['cpu']}, {machine['isa']}; {report['date']}:"
    )
    yield ""
    yield f"    {report['command']}"
    for race in report["races"]:
        peers = [engine for engine in race["engines"] if engine != OURS]
        pairs = max((len(result["seconds"]) for result in race["results"]), default=0)
        threads = "thread" if race["threads"] == 1 else "threads"
        yield ""
        yield (
            f"{race['threads']} {threads}, KV {race['kv']}, tok/s, medians of {pairs} pairs; in brackets how "
            "many times as"
        )
        yield "fast qwen3c is, pair by pair: median, smallest to largest."
        yield ""
        yield from (f"- {engine}: {settings}" for engine, settings in race["engines"].items())
        yield ""
        yield row(["", OURS, "of the limit", *peers])
        yield "|---" * (len(peers) + 3) + "|"
        yield from (row(cells(results, peers)) for results in by_test(race))
        yield from (row(line) for line in figures(race["figures"], peers))
        if race["verdict"]:
            yield ""
            yield f"The benchmark's own verdict: {race['verdict']}."
    others = list(figures(report["figures"], []))
    if others:
        yield ""
        yield row(["", OURS])
        yield "|---|---|"
        yield from (row(line[:2]) for line in others)


def row(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def cells(results: Results, peers: Sequence[str]) -> list[str]:
    """The cells of a test: its name, our rate and share of the limit, each peer's rate and ratio or ""."""
    ours = results[OURS]
    line = [what(ours), rate(ours["tokens_per_second"]), f"{ours['share_of_limit']:.0%}"]
    for peer in peers:
        if peer not in results:
            line.append("")
            continue
        times = ratios(ours, results[peer])
        spread = f"{statistics.median(times):.2f}, {min(times):.2f} to {max(times):.2f}"
        line.append(f"{rate(results[peer]['tokens_per_second'])} ({spread})")
    return line


def figures(measured: Sequence[dict[str, Any]], peers: Sequence[str]) -> Iterator[list[str]]:
    """The lines of measurements without tokens per second: medians, in the columns of `cells`."""
    found: dict[str, dict[str, str]] = {}
    for figure in measured:
        values = found.setdefault(f"{figure['what']}, {figure['unit']}", {})
        values[figure["engine"]] = f"{statistics.median(figure['values']):.3g}"
    for words, values in found.items():
        yield [words, *(values.get(engine, "") for engine in (OURS, "", *peers))]


# ----------------------------------------------------------------------------
# The line, and the documents


def line(report: Report) -> Iterator[str]:
    """README's sentence: our rates of prefill and decode, and how many times a peer's they are."""
    race = report["races"][0]
    said = []
    for results in by_test(race):
        ours = results[OURS]
        if ours["kind"] not in ("pp", "tg") or ours["depth"] or ours["batch"] > 1:
            continue
        times = [
            f"{statistics.median(ratios(ours, theirs)):.1f} times {engine}"
            for engine, theirs in results.items()
            if engine != OURS
        ]
        beside = f" ({', '.join(times)})" if times else ""
        said.append(f"{what(ours)} at {rate(ours['tokens_per_second'])} tok/s{beside}")
    cores = "one core" if race["threads"] == 1 else f"{race['threads']} cores"
    yield (
        f"Speed, on {cores} of {report['machine']['cpu']}, {LINE_FROM} parameters, {report['date']}: "
        f"{'; '.join(said)}. [Every figure, and how it was measured](docs/SPEED.md)."
    )


def filled(text: str, reports: dict[str, Report]) -> str:
    """`text` with its places filled in; one whose figures are not there stays as it is."""

    def fill(place: re.Match[str]) -> str:
        name = place[2]
        report = reports.get(LINE_FROM if name == LINE else name)
        if report is None:
            return place[0]
        made = line(report) if name == LINE else table(report)
        return place[1] + "\n".join(made) + "\n" + place[3]

    return PLACE.sub(fill, text)


def missing(text: str, reports: dict[str, Report]) -> list[str]:
    """Names of the JSON files that the places of `text` need and that are not there."""
    needed = {LINE_FROM if name == LINE else name for _, name, _ in PLACE.findall(text)}
    return sorted(needed - reports.keys())


def main(argv: Sequence[str] | None = None) -> int:
    """Status 1 if figures are missing, or if --check finds a document that they contradict."""
    parser = argparse.ArgumentParser(
        prog="tables.py", description="docs/speed/*.json -> docs/SPEED.md, README.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="DIR", help="of the project (default: this one)"
    )
    args = parser.parse_args(argv)
    reports = {
        path.stem: json.loads(path.read_text()) for path in sorted(args.root.glob("docs/speed/*.json"))
    }
    status, absent = 0, set[str]()
    for document in DOCUMENTS:
        before = (args.root / document).read_text()
        after = filled(before, reports)
        absent |= set(missing(before, reports))
        if after == before:
            continue
        if args.check:
            status = 1
        else:
            (args.root / document).write_text(after)
        print(f"{document}: {'not what the figures say' if args.check else 'written'}", file=sys.stderr)
    for name in sorted(absent):
        print(f"docs/speed/{name}.json is missing: bench.py --json writes it", file=sys.stderr)
    return 1 if absent else status


if __name__ == "__main__":
    sys.exit(main())
