"""Curves over steps from the `metrics.jsonl` of runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.foundation.errors import writing

matplotlib.rcParams |= {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
COLOURS = ("#0b6e4f", "#c8553d", "#3d5a98", "#8a6fb0", "#b08900", "#555555")
CURVES = {
    "accuracy": ("eval/avg_at_k", "accuracy on held-out problems", 1),
    "cosine": ("representation/cosine", "cosine of student and teacher states", 1),
    "length": ("rollout/mean_length", "response length (tokens)", 10),
}


def plot_runs(runs: Mapping[str, Sequence[Path]], output: Path, levels: Mapping[str, float]) -> list[Path]:
    """Write accuracy.png, cosine.png and length.png to `output`, one curve per run.

    A run may lie in several folders, each going on where the last ended. `levels` are accuracies drawn as
    horizontal lines. Lengths are running means over ten steps.
    """
    written = []
    for file, (key, label, window) in CURVES.items():
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel="optimiser step", ylabel=label)
        for colour, (name, folders) in zip(COLOURS, runs.items(), strict=False):
            _curve(axes, folders, key, window, name, colour)
        if file == "accuracy":
            _levels(axes, levels)
        figure.legend(loc="outside upper center", ncols=3 if max(map(len, runs), default=0) < 25 else 2)
        path = output / f"{file}.png"
        with writing(path):
            figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _curve(axes: Axes, folders: Sequence[Path], key: str, window: int, name: str, colour: str) -> None:
    points, before = [], 0.0
    for records in (read_metrics(folder / METRICS_FILE) for folder in folders):
        points += [(before + r["step"], r[key]) for r in records if key in r]
        before += records[-1]["step"] if records else 0
    if not points:
        return
    steps, values = zip(*points, strict=True)
    smooth = [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    axes.plot(steps, smooth, label=name, color=colour, marker="o" if len(points) < 30 else "", markersize=3)


def _levels(axes: Axes, levels: Mapping[str, float]) -> None:
    for name, value in levels.items():
        axes.axhline(value, color="#888888", linewidth=1, linestyle="--")
        axes.annotate(
            name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
