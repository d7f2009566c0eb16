"""The mean and range over seeds of finished demos, as a Markdown table.

for s in 0 1 2; do oprd demo --seed $s --output runs/demo-$s; done
python benchmarks/demo_seeds.py runs/demo-*
"""

import json
import statistics
import sys
from pathlib import Path

from oprd.cli.demo_pairs import LABELS


def table(folders: list[Path]) -> str:
    """One row per arm: mean (min–max) of Avg@k, then the means of the rest."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    samples = summaries[0]["settings"]["samples"]
    heads = ("arm", f"Avg@{samples}", "gap closed", f"Best@{samples}", "Dist-4g", "Avg Len", "s/update")
    lines = [f"| {' | '.join(heads)} | transient MB |", "|---" * 8 + "|"]
    for arm in summaries[0]["arms"]:
        values = [summary["arms"][arm] for summary in summaries]
        accuracy = [100 * value["avg_at_k"] for value in values]
        closed = [summary["gap_closed"].get(arm) for summary in summaries]
        cells = [
            LABELS[arm],
            f"{statistics.mean(accuracy):.1f} ({min(accuracy):.1f}–{max(accuracy):.1f})",
            f"{100 * statistics.mean(closed):.1f} %" if closed[0] is not None else "",
            f"{100 * _mean(values, 'best_at_k'):.1f}",
            f"{_mean(values, 'dist_4g'):.2f}",
            f"{_mean(values, 'mean_length'):.1f}",
            f"{_mean(values, 'seconds_per_update'):.2f}" if values[0]["seconds_per_update"] else "",
            f"{_mean(values, 'transient_mb'):.0f}" if values[0]["transient_mb"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[dict[str, float]], key: str) -> float:
    return statistics.mean(value[key] for value in values)


if __name__ == "__main__":
    print(table([Path(argument) for argument in sys.argv[1:]]))
