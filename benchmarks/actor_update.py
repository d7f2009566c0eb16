"""What does one actor update cost beside its limit, the two backbones alone?

    python benchmarks/actor_update.py --preset cpu                    # all arms, results/actor_update-cpu.csv
    python benchmarks/actor_update.py --preset cpu --rows all         # every loss on all rows, or the last k
    python benchmarks/actor_update.py --preset cpu --sweep length     # over T; --sweep vocabulary: over |V|
    python benchmarks/actor_update.py --preset qwen2.5-1.5b --shapes  # memory alone, on fake tensors
    python benchmarks/actor_update.py --model google/gemma-3-270m     # a real model, its own teacher

An update is teacher forward, student forward and backward on one batch of rollouts, the same random weights
and tokens for all arms (arms.py has them), gradient checkpointing on; the optimiser, the same
for all, is left out. Seconds are wall time; memory is torch's allocations at most, gradients included, over
those before the update. On CUDA that is the allocator's peak, on a CPU the sum of the profiler's events in
an update of its own, which is the warm-up too (what is resident there lies by the habits of malloc). Where
it would take minutes or has no room, and with --shapes, the update runs on fake tensors, and what lives is
counted: the same to some kilobytes (tests/unit/project/test_update_benchmark.py).
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from arms import ARMS, LARGE, LONG, PRESETS, ROWS, Arm, Shape, counted_mb, shape_of
from harness import Row, hardware, of_arm, paired_ratio, run_in_turn, serve, write
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from oprd.foundation.meters import MB

HERE = Path(__file__).parent
# What `make bench-quick` holds the ratios of one run to: arm, what it is divided by, measure, least, most.
CHECKS = (
    ("oprd", "bare", "seconds", 0.0, 1.10),
    ("oprd", "bare", "transient_mb", 0.0, 1.15),
    ("oprd_bridge", "oprd", "seconds", 0.0, 1.10),
    ("top_16_whole", "oprd", "seconds", 2.5, 1e9),
    ("top_16_whole", "oprd", "transient_mb", 5.0, 1e9),
    ("full_vocab", "oprd", "seconds", 1.5, 1e9),
    ("full_vocab", "oprd", "transient_mb", 2.0, 1e9),
    ("full_vocab", "trl", "seconds", 0.0, 1.05),
    ("full_vocab", "trl", "transient_mb", 0.0, 1.05),
)
LABELS = {
    "tokens": "response tokens T",
    "vocabulary": "vocabulary |V|",
    "seconds": "seconds",
    "transient_mb": "transient MB",
}
SIZES = ("tokens", "last", "vocabulary", "rollouts")
SWEEPS = {
    "length": ("tokens", (512, 1024, 2048, 4096, 8192, 16_384, 32_768)),
    "vocabulary": ("vocabulary", (32_000, 64_000, 151_936, 256_000)),
}


def fits(arm: str, shape: Shape) -> bool:
    """Whether an arm's whole logits have room on this machine."""
    if arm not in LARGE:
        return True
    if torch.cuda.is_available():
        room = torch.cuda.get_device_properties(0).total_memory
    else:
        room = psutil.virtual_memory().available
    return counted_mb(arm, shape) * MB < 0.6 * room


def measure(name: str, shape: Shape, arms: Sequence[str], repeats: int) -> list[Row]:
    """Rounds of the arms that have room; of the others what they would hold."""
    kept = [arm for arm in arms if fits(arm, shape)]
    arguments = ["--model", shape.model] if shape.model else ["--preset", name]
    for size in (*SIZES, "rows"):
        arguments += [f"--{size}", str(getattr(shape, size))]
    on_cuda = torch.cuda.is_available()
    repeats = 1 if shape.tokens >= LONG and not on_cuda else repeats
    with tempfile.TemporaryDirectory() as shared:
        arguments += ["--shared", shared]
        rows = run_in_turn(__file__, kept, arguments, repeats, warm_up=on_cuda)
    return _about(name, shape, rows) + count(name, shape, [arm for arm in arms if arm not in kept])


def count(name: str, shape: Shape, arms: Sequence[str]) -> list[Row]:
    """What arms hold, on fake tensors."""
    rows = [{"arm": arm, "repeat": 0, "transient_mb": counted_mb(arm, shape)} for arm in arms]
    return _about(name, shape, rows)


def _about(name: str, shape: Shape, rows: Sequence[Row]) -> list[Row]:
    about = {"preset": name} | {size: getattr(shape, size) for size in (*SIZES, "rows")}
    return [about | row | hardware() for row in rows]


def print_table(rows: Sequence[Row]) -> None:
    """Medians, and what an arm costs in units of the bare backbones and of ours."""
    print(
        "| arm | seconds | ÷ bare | ÷ oprd | transient MB | ÷ bare | ÷ oprd |\n|---|---|---|---|---|---|---|"
    )
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [arm]
        for key, digits in (("seconds", 2), ("transient_mb", 0)):
            values = of_arm(rows, arm, key)
            cells.append(f"{statistics.median(values):.{digits}f}" if values else "")
            for base in ("bare", "oprd"):
                below = of_arm(rows, base, key)
                paired = len(values) == len(below) > 0
                cells.append("{:.3g} ({:.3g}–{:.3g})".format(*paired_ratio(values, below)) if paired else "")
        print("| " + " | ".join(cells) + " |")


def check(rows: Sequence[Row]) -> list[str]:
    """The ratios that left their bounds with their whole interval."""
    broken = []
    for arm, base, key, least, most in CHECKS:
        middle, low, high = paired_ratio(of_arm(rows, arm, key), of_arm(rows, base, key))
        verdict = "ok" if high >= least and low <= most else "BROKEN"
        ratio = f"{middle:.3g} ({low:.3g}–{high:.3g})"
        print(f"{verdict}: {key} of {arm} ÷ {base} = {ratio}, bounds {least:g}–{most:g}")
        broken += [] if verdict == "ok" else [f"{key} of {arm} ÷ {base}"]
    return broken


def plot(rows: Sequence[Row], over: str, path: Path) -> None:
    """What was measured of seconds and memory, over a swept size, one line per arm."""
    measured = [key for key in ("seconds", "transient_mb") if any(key in row for row in rows)]
    figure = Figure(figsize=(4.8 * len(measured), 4.2), layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    for axes, key in zip(panels, measured, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            sizes = sorted({row[over] for row in rows if row["arm"] == arm and key in row})
            medians = [
                statistics.median(of_arm([row for row in rows if row[over] == size], arm, key))
                for size in sizes
            ]
            axes.plot(sizes, medians, marker="o", markersize=3, label=arm if axes is panels[0] else None)
        axes.set(xscale="log", yscale="log", xlabel=LABELS[over], ylabel=LABELS[key])
        swept = sorted({row[over] for row in rows})
        axes.set_xticks(swept, [f"{size:,}" for size in swept], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--model", help="a folder or a Hub name, in place of a preset")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rows", choices=ROWS, default="paper", help="which rows the losses supervise")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", choices=SWEEPS)
    parser.add_argument("--sizes", type=int, nargs="+", help="of the sweep")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shapes", action="store_true", help="memory alone, on fake tensors")
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio leaves its bounds")
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    sizes = {name: getattr(given, name) for name in SIZES if getattr(given, name)}
    shape = shape_of(given.model) if given.model else PRESETS[given.preset]
    shape = replace(shape, rows=given.rows, **sizes)
    name = Path(given.model).name.lower() if given.model else given.preset
    if given.worker:
        serve(Arm(given.worker, shape, given.shared).measure)
        return
    rows = None if given.rows == "paper" else f"rows-{given.rows}"
    words = [name, *filter(None, (given.sweep, rows, "shapes" if given.shapes else None))]
    output = given.output or HERE / "results" / f"actor_update-{'-'.join(words)}.csv"

    def found(shape: Shape) -> list[Row]:
        if given.shapes:
            return count(name, shape, given.arms)
        return measure(name, shape, given.arms, given.repeats)

    if not given.sweep:
        rows = found(shape)
        write(output, rows)
        print_table(rows)
        if given.check and check(rows):
            raise SystemExit(1)
        return
    over, swept = SWEEPS[given.sweep]
    rows = []
    for size in given.sizes or swept:
        rows += found(replace(shape, **{over: size}))
        write(output, rows)
    plot(rows, over, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
