"""The tables and plots of the study, from what lies in results/study/."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "study"


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
        for split in ("test", "test-templates"):
            share, (low, high) = run["held_out"][split]["avg_at_k"], run["held_out"][split]["ci95"]
            cells.append(f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})")
        cells.append(f"{run['held_out']['test']['mean_length']:.1f}")
        last = run["curve"][-1] if "curve" in run else None
        cells.append(f"{last['seconds'] / last['step']:.1f}" if last else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
