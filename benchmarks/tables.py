"""Figures of docs/speed/*.json -> the tables of docs/SPEED.md and the line of speed in README.md.

    python benchmarks/bench.py --against llama.cpp,openvino,ctranslate2 --json docs/speed/0.6B.json
    python benchmarks/tables.py            # writes both documents; --check only says whether they are up to date

A document has a place for each table, between `<!-- speed NAME -->` and `<!-- end -->`. What stands there comes from the
JSON that bench.py wrote and from nowhere else, so that two places cannot contradict each other.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "speed"
DOCUMENTS = (ROOT / "docs" / "SPEED.md", ROOT / "README.md")
PLACE = re.compile(r"(<!-- speed (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = "qwen3c"
LINE = "line"  # the place of the one sentence that README has

Results = dict[str, dict[str, Any]]  # engine -> result of one test


def what(result: dict[str, Any]) -> str:
    """A test in words, such as "decode at position 8,192, 4 sessions together"."""
    n, depth, batch = (result[key] for key in ("n", "depth", "batch"))
    words = {
        "pp": f"prefill of {n:,}",
        "tg": "decode",
        "loop": "decode, the whole token loop",
        "mix": f"a pass of {n:,} prompt tokens and {batch:,} sessions that decode",
    }[result["kind"]]
    words += f" at position {depth:,}" if depth else ""
    return words + (f", {batch} sessions together" if batch > 1 and result["kind"] != "mix" else "")


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> list[float]:
    """How many times as fast we are, pair by pair."""
    return [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]


def tests(race: dict[str, Any]) -> Iterator[Results]:
    """The results of a race by test, in the order in which they were run."""
    found: dict[str, Results] = {}
    for result in race["results"]:
        found.setdefault(result["test"], {})[result["engine"]] = result
    yield from found.values()


def cells(results: Results, peers: Sequence[str]) -> list[str]:
    """Test, our rate, our share of the limit; each peer's rate with the ratio (smallest to largest)."""
    ours = results[OURS]
    share = ours.get("share_of_limit")
    row = [what(ours), rate(ours["tokens_per_second"]), "" if share is None else f"{share:.0%}"]
    for peer in peers:
        if peer not in results:
            row.append("")
            continue
        times = ratios(ours, results[peer])
        spread = f"{statistics.median(times):.2f}, {min(times):.2f} to {max(times):.2f}"
        row.append(f"{rate(results[peer]['tokens_per_second'])} ({spread})")
    return row


def rate(tokens_per_second: float) -> str:
    """Three digits: 1,160 or 70.1 or 6.45."""
    digits = 0 if tokens_per_second >= 100 else 1 if tokens_per_second >= 10 else 2
    return f"{tokens_per_second:,.{digits}f}"


def table(report: dict[str, Any]) -> Iterator[str]:
    """Markdown: where and how it was measured, then a table for each number of threads and type of KV cache."""
    machine, model = report["machine"], report["model"]
    yield (
        f"{model['name']}, {model['parameters'] / 1e6:,.0f} M parameters, groups of {model['group_size']}; "
        f"{machine['cpu']}, {machine['isa']}, {report['date']}:"
    )
    yield ""
    yield f"    {report['command']}"
    for race in report["races"]:
        peers = [engine for engine in race["engines"] if engine != OURS]
        pairs = max((len(result["seconds"]) for result in race["results"]), default=0)
        yield ""
        yield f"{race['threads']} threads, KV {race['kv']}, tok/s, medians of {pairs} pairs:"
        yield ""
        yield "| | " + " | ".join([OURS, "of the limit", *peers]) + " |"
        yield "|---" * (len(peers) + 3) + "|"
        for results in tests(race):
            if OURS in results:
                yield "| " + " | ".join(cells(results, peers)) + " |"
        for figure in race["figures"]:
            yield f"| {figure_words(figure)} |" + " |" * (len(peers) + 1)
        yield ""
        yield f"The benchmark's own verdict: {race['verdict']}"


def figure_words(figure: dict[str, Any]) -> str:
    """Such as "first token, llama.cpp | 0.49 s"."""
    return (
        f"{figure['what']}, {figure['engine']} | {statistics.median(figure['values']):.3g} {figure['unit']}"
    )


def line(report: dict[str, Any]) -> Iterator[str]:
    """README's sentence: our rates for one model, and how many times a peer's they are."""
    race = report["races"][0]
    said = []
    for results in tests(race):
        ours = results.get(OURS)
        if ours is None or ours["kind"] not in ("pp", "tg") or ours["depth"]:
            continue
        times = [
            f"{statistics.median(ratios(ours, theirs)):.1f}x {peer}"
            for peer, theirs in results.items()
            if peer != OURS
        ]
        said.append(f"{what(ours)} {rate(ours['tokens_per_second'])} tok/s ({', '.join(times)})")
    machine = report["machine"]
    yield (
        f"{report['model']['name']} on {race['threads']} cores of {machine['cpu']}, {report['date']}: "
        + "; ".join(said)
        + ". Every figure, with its command: [docs/SPEED.md](docs/SPEED.md)."
    )


def filled(text: str, reports: dict[str, dict[str, Any]]) -> str:
    """`text` with every place filled in. KeyError names a place without figures."""

    def fill(place: re.Match[str]) -> str:
        name = place[2]
        made: Iterable[str] = line(reports["0.6B"]) if name == LINE else table(reports[name])
        return place[1] + "\n".join(made) + "\n" + place[3]

    return PLACE.sub(fill, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Status 1 if --check finds a document that the figures contradict."""
    parser = argparse.ArgumentParser(
        prog="tables.py", description="docs/speed/*.json -> docs/SPEED.md, README.md"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(FIGURES.glob("*.json"))}
    status = 0
    for path in DOCUMENTS:
        before = path.read_text()
        after = filled(before, reports)
        if after != before:
            status = 1
            if not args.check:
                path.write_text(after)
            print(f"{path.name}: {'out of date' if args.check else 'written'}", file=sys.stderr)
    return status if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
