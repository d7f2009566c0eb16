"""Metrics of evaluations as tables on the terminal, for `oprd eval` and `oprd demo`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADS = {
    "avg_at_k": "Avg@{k}",
    "ci95": "95%",
    "best_at_k": "Best@{k}",
    "majority_at_k": "Maj@{k}",
    "dist_4g": "Dist-4g",
    "mean_length": "Avg Len",
    "truncated_share": "truncated",
    "no_answer_share": "no answer",
}
FORMATS = {"dist_4g": "{:.2f}", "mean_length": "{:.1f}"}
WIDTH = 120
MANY = 0.5  # share of responses without an answer that is worth a word


def heads(keys: Sequence[str], samples: int) -> list[str]:
    """The heads of the columns that show `keys` of a summary."""
    return [HEADS[key].format(k=samples) for key in keys]


def cells(keys: Sequence[str], summary: Mapping[str, Any]) -> list[str]:
    """The metrics `keys` of a summary as they are shown."""
    return [_cell(key, summary[key]) if key in summary else "" for key in keys]


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The table of one evaluation, its pass@k, and what to do if most responses state no answer."""
    table = Table(title=f"{summary['num_problems']} problems, {summary['samples']} samples of each")
    for head in heads(list(HEADS), summary["samples"]):
        table.add_column(head, justify="right")
    table.add_row(*cells(list(HEADS), summary))
    Console(width=WIDTH).print(table)
    print(", ".join(f"pass@{k} {share:.1%}" for k, share in summary["pass_at_k"].items()))
    if summary.get("no_answer_share", 0) > MANY:
        print(_advice(summary))
    print(f"responses and summary: {folder}")


def _cell(key: str, value: Any) -> str:
    if key == "ci95":
        return "–".join(f"{bound:.1%}" for bound in value)
    return FORMATS.get(key, "{:.1%}").format(value)


def _advice(summary: Mapping[str, Any]) -> str:
    share = summary["no_answer_share"]
    if summary["truncated_share"] >= share / 2:
        cause = "many were cut at --max_new_tokens: raise it"
    else:
        cause = r"ask for one, e.g. --prompt_suffix ' Put your final answer within \boxed{}.'"
    return (
        rf'no \boxed{{}} and no "Answer:" line in {share:.1%} of the responses, which count as wrong: {cause}'
    )
