"""Pictures of what bench.py measured, from its JSON: the roofline, and tokens/s by depth, batch and threads.

python benchmarks/pictures.py results.json DIR
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Result = dict[str, Any]
OURS = "qwen3c"


def draw(data: dict[str, Any], directory: Path) -> list[Path]:
    """Write the pictures for which the data has enough points."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [roofline(data, directory / "roofline.png")]
    for name, kind, value, keep in (
        ("depth", "tg", lambda race, r: r["depth"], lambda r: r["batch"] == 1),
        ("batch", "tg", lambda race, r: r["batch"], lambda r: r["depth"] == 0),
        ("threads", "tg", lambda race, r: race["threads"], lambda r: r["depth"] == 0 and r["batch"] == 1),
    ):
        written.append(curves(data, directory / f"{name}.png", name, kind, value, keep))
    return [path for path in written if path]


def results(data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Result]]:
    for race in data["races"]:
        for result in race["results"]:
            yield race, result


def curves(
    data: dict[str, Any],
    path: Path,
    what: str,
    kind: str,
    value: Callable[[dict[str, Any], Result], int],
    keep: Callable[[Result], bool],
) -> Path | None:
    """Tokens per second over `value`, a line for each engine and setting; None if there is one point only."""
    lines: dict[str, dict[int, Result]] = defaultdict(dict)
    for race, result in results(data):
        if result["kind"] == kind and keep(result):
            setting = (
                f"KV {race['kv']}" if what == "threads" else f"{race['threads']} threads, KV {race['kv']}"
            )
            lines[f"{result['engine']}, {setting}"][value(race, result)] = result
    if max((len(points) for points in lines.values()), default=0) < 2:
        return None
    figure, axes = new_figure(data)
    for label, points in sorted(lines.items()):
        places = sorted(points)
        rates = [points[place]["tokens_per_second"] for place in places]
        axes.errorbar(
            places, rates, [points[place]["sigma"] for place in places], marker="o", capsize=3, label=label
        )
    axes.set(xlabel=what, ylabel="tokens/s", ylim=(0, None))
    axes.legend()
    return save(figure, path)


def roofline(data: dict[str, Any], path: Path) -> Path | None:
    """Multiply-adds per second over multiply-adds per byte; under the roof of bandwidth and int8 peak."""
    ours = [(race, result) for race, result in results(data) if result["engine"] == OURS]
    if not ours:
        return None
    figure, axes = new_figure(data)
    threads = max(race["threads"] for race, _ in ours)
    shown = [result for race, result in ours if race["threads"] == threads]
    bandwidth = statistics.median(value for result in shown for value in result["bandwidth"])
    peak = statistics.median(value for result in shown for value in result["int8_peak"])
    places = [result["multiply_adds"] / result["bytes"] for result in shown]
    knee = peak / bandwidth
    roof = sorted([min(places) / 2, knee, max(*places, knee) * 2])
    axes.loglog(roof, [min(bandwidth * x, peak) / 1e9 for x in roof], color="black")
    axes.annotate(
        f"{bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} G MAC/s, {threads} threads", (knee, peak / 1e9),
        xytext=(0, 8), textcoords="offset points", ha="center",
    )  # fmt: skip
    for place, result in zip(places, shown, strict=True):
        rate = result["multiply_adds"] / statistics.median(result["seconds"]) / 1e9
        axes.plot(place, rate, "o")
        axes.annotate(result["test"], (place, rate), xytext=(5, -10), textcoords="offset points", fontsize=8)
    axes.set(xlabel="multiply-adds per byte read", ylabel="G multiply-adds a second")
    return save(figure, path)


def new_figure(data: dict[str, Any]) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    machine, model = data["machine"], data["model"]
    axes.set_title(f"{model['name']}, {machine['cpu']}, {machine['isa']}", fontsize=10)
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


if __name__ == "__main__":
    for path in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(path)
