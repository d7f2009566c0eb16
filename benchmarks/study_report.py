"""The tables and plots of the study, from what lies in results/study/.

python benchmarks/study_report.py    # docs/images/study-PAIR.png of every pair that has results
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS, IMAGES = HERE / "results" / "study", HERE.parent / "docs" / "images"
SPLITS = {"test": "the training problems' templates", "test-templates": "other templates"}
ENDS = ("student", "teacher")


def results(pair: str) -> list[dict[str, Any]]:
    """The results of a pair: student and teacher first, then arms by name and seed."""
    found = [json.loads(path.read_text()) for path in (RESULTS / pair).glob("*.json")]
    return sorted(found, key=lambda run: ("seed" in run, run["arm"], run.get("seed", 0)))


def table(pair: str) -> str:
    """Accuracy on held-out problems in per cent, with 95 % intervals over problems."""
    lines = [
        "| arm | seed | learning rate | test | other templates | tokens | seconds a step |",
        "|---" * 7 + "|",
    ]
    for run in results(pair):
        cells = [run["arm"], str(run.get("seed", "")), run.get("learning_rate", "")]
        for split in SPLITS:
            share, (low, high) = run["held_out"][split]["avg_at_k"], run["held_out"][split]["ci95"]
            cells.append(f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})")
        cells.append(f"{run['held_out']['test']['mean_length']:.1f}")
        last = run["curve"][-1] if "curve" in run else None
        cells.append(f"{last['seconds'] / last['step']:.1f}" if last else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(pair: str) -> Figure:
    """Accuracy of every run with its interval, the best on top; student and teacher are lines."""
    found = results(pair)
    runs = [run for run in found if run["arm"] not in ENDS]
    runs.sort(key=lambda run: run["held_out"]["test"]["avg_at_k"])
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (split, label) in zip(panels, SPLITS.items(), strict=True):
        for place, run in enumerate(runs):
            share, (low, high) = run["held_out"][split]["avg_at_k"], run["held_out"][split]["ci95"]
            axes.plot([100 * low, 100 * high], [place, place], color="#0b6e4f", linewidth=1.5)
            axes.plot(100 * share, place, "o", color="#0b6e4f", markersize=5)
        for end in (run for run in found if run["arm"] in ENDS):
            share = 100 * end["held_out"][split]["avg_at_k"]
            axes.axvline(share, color="#888888", linestyle="--", linewidth=1)
            axes.annotate(
                end["arm"],
                (share, 1),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize=8,
            )
        axes.set(xlabel=f"accuracy (%), {label}", xlim=(0, 100))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.25)
    names = [f"{run['arm']}" + (f", seed {run['seed']}" if run["seed"] else "") for run in runs]
    panels[0].set_yticks(range(len(runs)), names)
    return figure


def main() -> None:
    for folder in sorted(RESULTS.iterdir()):
        plot(folder.name).savefig(IMAGES / f"study-{folder.name}.png", dpi=150)


if __name__ == "__main__":
    main()
