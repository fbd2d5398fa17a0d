"""metrics.jsonl -> curves.png: loss, learning rate, speed, reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Records = Sequence[dict[str, Any]]

INK, FAINT, BLUE, ORANGE, GREEN = "#1f2430", "#d9dce3", "#2f6fde", "#e07b28", "#2a9d6f"


def draw(records: Records, path: Path) -> None:
    """One panel per kind of figure that the records hold, over the steps; written as PNG to `path`."""
    from matplotlib.figure import Figure

    panels = [
        panel
        for panel in (
            [("loss", BLUE, "training"), ("validation_loss", ORANGE, "validation")],
            [("reward", BLUE, "training"), ("validation_reward", ORANGE, "held out")],
            [("kl", GREEN, "KL to the reference")],
            [("learning_rate", GREEN, "learning rate")],
            [("tokens_per_second", BLUE, "tokens per second")],
        )
        if any(name in record for record in records for name, _, _ in panel)
    ]
    figure = Figure(figsize=(9, 2.6 * max(len(panels), 1)), dpi=110, layout="constrained")
    axes = figure.subplots(max(len(panels), 1), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=False):
        for name, colour, label in panel:
            _line(ax, records, name, colour, label)
        ax.grid(color=FAINT, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9, loc="best")
        ax.tick_params(labelsize=9, colors=INK)
    axes[-1].set_xlabel("step", color=INK)
    figure.savefig(path, format="png")


def _line(ax: Any, records: Records, name: str, colour: str, label: str) -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if name == "learning_rate":
        ax.plot(steps, values, color=colour, linewidth=1.6, label=label)
    elif len(points) > 50 and not name.startswith("validation"):
        smooth = _smooth(values, max(5, len(values) // 50))
        ax.plot(steps, values, color=colour, linewidth=0.7, alpha=0.25)
        ax.plot(steps, smooth, color=colour, linewidth=1.6, label=f"{label} {smooth[-1]:.4g}")
    else:
        ax.plot(
            steps,
            values,
            color=colour,
            linewidth=1.6,
            marker="o",
            markersize=3,
            label=f"{label} {values[-1]:.4g}",
        )


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Means over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
