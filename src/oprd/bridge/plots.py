"""A bridge in pictures, from its metadata: curves over ranks (the paper's Fig. 12), ρ² and CKA by layer."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from oprd.foundation.errors import writing

DIRECTIONS_SHOWN = 64
NAMED_LAYERS = 8  # more than these get a colour bar in place of names


def print_bridge(metadata: dict[str, Any]) -> None:
    """Print every pair of layers with its rank, held-out cosine and CKA, and what the fit has read."""
    table = Table("student layer", title="Bridge", title_justify="left")
    for column in ("teacher layer", "rank", "held-out cosine", "CKA"):
        table.add_column(column, justify="right")
    for layer, report in metadata["layers"].items():
        shown = ("" if x is None else f"{x:.3f}" for x in (report["cosine_at_rank"], report["cka"]))
        table.add_row(layer, str(report["teacher_layer"]), str(report["rank"] or "dropped"), *shown)
    console = Console()
    console.print(table)
    data = metadata.get("data")
    if data:
        console.print(
            f"{metadata['num_rows']:,} rows of {data['rollouts']:,} rollouts; {data['coverage']:.1%} of the "
            f"student's rows are paired; {data['truncated']:,} rollouts were cut at the limit",
            soft_wrap=True,
        )


def plot_bridge(metadata: dict[str, Any], folder: Path) -> list[Path]:
    """Write ranks.png, directions.png and cka.png to `folder`; without held-out rows only the last."""
    layers = {int(layer): report for layer, report in metadata["layers"].items()}
    figures = {"cka": _cka(metadata["cka"], layers)}
    if all(report["share"] is not None for report in layers.values()):
        figures |= {"ranks": _ranks(layers), "directions": _directions(layers)}
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        with writing(paths[-1]):
            figure.savefig(paths[-1], dpi=150)
    return paths


def _ranks(layers: dict[int, dict[str, Any]]) -> Figure:
    """Held-out cosine and error over the rank, per layer, before (random P_S) and after the fit."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for colour, (layer, report) in zip(colours, layers.items(), strict=True):
        ranks = range(1, len(report["cosine"]) + 1)
        name = f"layer {layer}" if len(layers) <= NAMED_LAYERS else None
        left.plot(ranks, report["cosine"], color=colour, label=name)
        left.plot(ranks, report["cosine_before"], color=colour, linestyle=":", linewidth=1)
        right.plot(ranks, report["mse"], color=colour)
        right.plot(ranks, report["mse_before"], color=colour, linestyle=":", linewidth=1)
        if 0 < report["rank"] <= len(ranks) and report["directions"] == list(range(report["rank"])):
            chosen = report["rank"]
            left.plot(chosen, report["cosine"][chosen - 1], "o", color=colour)
            right.plot(chosen, report["mse"][chosen - 1], "o", color=colour)
    left.set(xscale="log", xlabel="rank", ylabel="held-out cosine", ylim=(-0.4, 1.02))
    right.set(xscale="log", yscale="log", xlabel="rank", ylabel="held-out mean squared error")
    for axes in (left, right):
        _base_two(axes, len(next(iter(layers.values()))["cosine"]))
    left.plot([], [], color="black", linestyle=":", linewidth=1, label="before the fit")
    left.plot([], [], "o", color="black", label="chosen rank")
    if len(layers) > NAMED_LAYERS:
        steps = BoundaryNorm(np.arange(len(layers) + 1), len(layers))
        bar = figure.colorbar(ScalarMappable(steps, ListedColormap(colours)), ax=(left, right))
        shown = range(0, len(layers), -(-len(layers) // NAMED_LAYERS))
        bar.set_ticks([i + 0.5 for i in shown], labels=[str(list(layers)[i]) for i in shown])
        bar.set_label("student layer")
    figure.legend(loc="outside upper center", ncols=min(len(layers) + 2, 7))
    return figure


def _directions(layers: dict[int, dict[str, Any]]) -> Figure:
    """Held-out ρ² of every teacher direction, by layer; kept directions end at the white marks."""
    shown = min(DIRECTIONS_SHOWN, min(len(report["share"]) for report in layers.values()))
    grid = np.array([report["share"][:shown] for report in layers.values()])
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(layers)), layout="constrained")
    axes = figure.add_subplot(xlabel="teacher direction, by variance", ylabel="student layer")
    image = axes.imshow(np.clip(grid, 0, 1), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, report in enumerate(layers.values()):
        kept = [direction for direction in report["directions"] if direction < shown]
        axes.plot(kept, [row] * len(kept), "|", color="white", markersize=4)
    axes.set_yticks(range(len(layers)), [f"{s} = {r['teacher_layer']}" for s, r in layers.items()])
    ticks = range(0, shown, max(1, shown // 16))
    axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    figure.colorbar(image, label="held-out ρ²; white: kept")
    return figure


def _cka(cka: dict[str, float], layers: dict[int, dict[str, Any]]) -> Figure:
    """Linear CKA of student and teacher layers; the pairs of the bridge are marked."""
    pairs = {tuple(map(int, key.split("="))): value for key, value in cka.items()}
    students, teachers = sorted({s for s, _ in pairs}), sorted({t for _, t in pairs})
    grid = np.array([[pairs.get((s, t), np.nan) for t in teachers] for s in students])
    figure = Figure(figsize=(2.6 + 0.32 * len(teachers), 1.9 + 0.32 * len(students)), layout="constrained")
    axes = figure.add_subplot(xlabel="teacher layer", ylabel="student layer")
    image = axes.imshow(grid, vmin=0, vmax=1, origin="lower", interpolation="nearest")
    marks = [(teachers.index(r["teacher_layer"]), students.index(s)) for s, r in layers.items()]
    axes.plot(*zip(*marks, strict=True), "s", markerfacecolor="none", color="white", markersize=8)
    axes.set_xticks(range(len(teachers)), list(map(str, teachers)))
    axes.set_yticks(range(len(students)), list(map(str, students)))
    figure.colorbar(image, label="linear CKA; squares: paired")
    return figure


def _base_two(axes: Axes, longest: int) -> None:
    ticks = [2**power for power in range(12) if 2**power <= longest]
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
