"""Curves and heatmaps over steps from the `metrics.jsonl` of runs."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

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
    """Write accuracy.png, cosine.png and length.png to `output`, one curve per run, and layers.png.

    A run may lie in several folders, each going on where the last ended. `levels` are accuracies drawn as
    horizontal lines. Lengths are running means over ten steps. layers.png has one heatmap for each run that
    logs the cosine of its layers.
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
    by_layer = {name: cosines_by_layer(folders) for name, folders in runs.items()}
    logged = {name: found for name, found in by_layer.items() if found}
    if logged:
        path = output / "layers.png"
        with writing(path):
            layers_figure(logged).savefig(path, dpi=150)
        written.append(path)
    return written


def cosines_by_layer(folders: Sequence[Path]) -> dict[float, dict[int, float]]:
    """By step, then by student layer: the cosine of student and teacher states."""
    name = "representation/cosine_layer_"
    found: dict[float, dict[int, float]] = {}
    for step, record in _steps(folders):
        cosines = {int(k.removeprefix(name)): value for k, value in record.items() if k.startswith(name)}
        if cosines:
            found[step] = cosines
    return found


def layers_figure(runs: Mapping[str, Mapping[float, Mapping[int, float]]]) -> Figure:
    """One heatmap for each run, on one colour scale: steps to the right, student layers upwards."""
    figure = Figure(figsize=(0.8 + 3.2 * len(runs), 3.8), layout="constrained")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    least = min(value for run in runs.values() for step in run.values() for value in step.values())
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        image = _heatmap(axes, run, least)
        axes.set(title=name, xlabel="optimiser step")
    panels[0].set_ylabel("student layer")
    figure.colorbar(image, ax=list(panels), label="cosine of student and teacher states")
    return figure


def _heatmap(axes: Axes, run: Mapping[float, Mapping[int, float]], least: float) -> AxesImage:
    steps, layers = sorted(run), sorted({layer for step in run.values() for layer in step})
    grid = np.array([[run[step].get(layer, np.nan) for step in steps] for layer in layers])
    axes.grid(False)
    image = axes.imshow(grid, vmin=least, vmax=1, origin="lower", aspect="auto", interpolation="nearest")
    for axis, names in ((axes.xaxis, [f"{step:g}" for step in steps]), (axes.yaxis, list(map(str, layers)))):
        locator = MaxNLocator(8, integer=True)
        ticks = [int(tick) for tick in locator.tick_values(0, len(names) - 1) if 0 <= tick < len(names)]
        axis.set_ticks(ticks, [names[tick] for tick in ticks])
    return image


def _steps(folders: Sequence[Path]) -> Iterator[tuple[float, dict[str, float]]]:
    before = 0.0
    for records in (read_metrics(folder / METRICS_FILE) for folder in folders):
        yield from ((before + record["step"], record) for record in records)
        before += records[-1]["step"] if records else 0


def _curve(axes: Axes, folders: Sequence[Path], key: str, window: int, name: str, colour: str) -> None:
    points = [(step, record[key]) for step, record in _steps(folders) if key in record]
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
