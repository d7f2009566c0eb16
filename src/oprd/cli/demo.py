"""`oprd demo`: distils a bundled teacher into the bundled student by several methods, side by side.

Every arm starts from the same student with the same prompts, steps and seeds.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from oprd.bridge.from_rollouts import fit_bridge
from oprd.bridge.recipe import BridgeArguments
from oprd.cli.demo_pairs import BRIDGE, LABELS, PAIRS, SHARED, STUDENT, TASK, Pair
from oprd.cli.plots import plot_runs
from oprd.evaluation.evaluate import SETTINGS_FILE, SUMMARY_FILE, evaluate
from oprd.evaluation.problems import EvalSettings
from oprd.evaluation.table import WIDTH, cells, heads
from oprd.folders.claims import check_foreign
from oprd.folders.lock import hold
from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.folders.whole import write_whole
from oprd.foundation.errors import UserError
from oprd.models.loading import load_model, load_tokenizer
from oprd.models.tiny.task import NUM_EVAL_PROBLEMS
from oprd.rollouts.generation import Sampling
from oprd.rollouts.prompts import load_prompts
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments
from oprd.training.train import train

ACCURACY, TEXTS = ("avg_at_k", "ci95", "best_at_k"), ("dist_4g", "mean_length")
OTHER_PROMPTS = 1000  # added to the seed of a second run
UPDATE_PARTS = ("time/teacher_seconds", "time/student_seconds", "time/optimizer_seconds")


def run_demo(
    output: Path, steps: int, problems: int, samples: int, seed: int, pair_name: str = "same"
) -> dict[str, Any]:
    """Train and evaluate every arm of a pair below `output`; returns and writes `summary.json`, with plots.

    Arms that a stopped demo finished are not repeated. Raises `UserError` for a folder of a demo with
    other settings, and for more problems than there are.
    """
    if problems > NUM_EVAL_PROBLEMS:
        raise UserError(f"--problems {problems}: there are {NUM_EVAL_PROBLEMS} held out, so ask for fewer")
    pair = PAIRS[pair_name]
    settings = {"pair": pair_name, "steps": steps, "problems": problems, "samples": samples, "seed": seed}
    settings |= {"arms": pair.arms, "bridges": pair.bridges}
    with hold(output, "oprd demo"):
        _claim(output, settings)
        return _compare(pair, output, settings)


def _compare(pair: Pair, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    problems, samples, seed = (settings[name] for name in ("problems", "samples", "seed"))
    for name, keys in pair.bridges.items():
        fit_bridge(_bridge(pair, keys, output / name, seed))
    folders = {"student": STUDENT, "teacher": pair.teacher}
    for arm in pair.arms:
        folders[arm] = _train_arm(pair, arm, output, settings)
    arms = {
        arm: _evaluate(arm, folder, output, problems, samples, seed) | _cost(output / arm)
        for arm, folder in folders.items()
    }
    student, teacher = arms["student"]["avg_at_k"], arms["teacher"]["avg_at_k"]
    gap = teacher - student
    closed = {arm: (arms[arm]["avg_at_k"] - student) / gap if gap else None for arm in pair.arms}
    summary = {"arms": arms, "gap_closed": closed, "settings": settings}
    write_whole(output / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    levels = {LABELS[arm]: arms[arm]["avg_at_k"] for arm in ("student", "teacher")}
    runs = {LABELS[arm]: [output / f"{arm}-first", output / arm] for arm in pair.arms}
    plot_runs(runs, output, levels)
    return summary


def print_summary(summary: dict[str, Any], output: Path) -> None:
    """The demo's table on the terminal."""
    samples = summary["settings"]["samples"]
    table = Table(title=f"{summary['settings']['steps']} on-policy steps from one student")
    table.add_column("arm")
    for head in (*heads(ACCURACY, samples), "gap closed", *heads(TEXTS, samples), "s/update", "transient MB"):
        table.add_column(head, justify="right")
    for arm, row in summary["arms"].items():
        closed = summary["gap_closed"].get(arm)
        table.add_row(
            LABELS[arm],
            *cells(ACCURACY, row),
            "" if closed is None else f"{closed:.0%}",
            *cells(TEXTS, row),
            "" if row["seconds_per_update"] is None else f"{row['seconds_per_update']:.2f}",
            "" if row["transient_mb"] is None else f"{row['transient_mb']:.0f}",
        )
    Console(width=WIDTH).print(table)
    print(f"summary, plots and runs: {output}")


def _bridge(pair: Pair, keys: dict[str, Any], folder: Path, seed: int) -> BridgeArguments:
    return BridgeArguments(
        model_name_or_path=STUDENT,
        teacher_model_name_or_path=pair.teacher,
        dataset_name=TASK,
        output_dir=str(folder),
        seed=seed,
        **BRIDGE,
        **keys,
    )


def _train_arm(pair: Pair, arm: str, output: Path, settings: dict[str, Any]) -> str:
    """The folder of a trained arm; one with a run before it starts where that ended, with other prompts."""
    keys, start, steps = dict(pair.arms[arm]), STUDENT, settings["steps"]
    if "after" in keys:
        first = settings | {"steps": steps // 2}
        arguments = _arguments(pair, keys.pop("after"), start, output / f"{arm}-first", first)
        start = str(train(*arguments, label=f"{LABELS[arm]}: first half"))
        settings = settings | {"steps": steps - steps // 2, "seed": settings["seed"] + OTHER_PROMPTS}
    return str(train(*_arguments(pair, keys, start, output / arm, settings), label=LABELS[arm]))


def _arguments(
    pair: Pair, keys: dict[str, Any], start: str, folder: Path, settings: dict[str, Any]
) -> tuple[RunArguments, OPRDConfig]:
    steps = settings["steps"]
    run = RunArguments(
        model_name_or_path=start,
        dataset_name=TASK,
        accuracy_dataset_name=TASK,
        accuracy_steps=max(steps // 10, 1),
        accuracy_problems=min(settings["problems"], 64),
        accuracy_samples=min(settings["samples"], 2),
    )
    keys = SHARED | {"teacher_model_name_or_path": pair.teacher} | keys
    if "bridge" in keys:
        keys |= {"bridge": str(folder.parent / keys["bridge"])}
    for name in ("representation_weight", "output_weight"):
        if name in keys:
            keys[name] = at_share(keys[name], steps)
    return run, OPRDConfig(output_dir=str(folder), max_steps=steps, seed=settings["seed"], **keys)


def at_share(schedule: str, steps: int) -> str:
    """A schedule whose steps may be written as shares of the run: `75%` is its step, `75%+` the next."""

    def step(match: re.Match[str]) -> str:
        return str(max(1, steps * int(match[1]) // 100) + bool(match[2]))

    return re.sub(r"(\d+)%(\+?)", step, schedule)


def _evaluate(
    arm: str, model_folder: str, output: Path, problems: int, samples: int, seed: int
) -> dict[str, Any]:
    tokenizer = load_tokenizer(model_folder)
    settings = EvalSettings(samples=samples, sampling=Sampling(max_new_tokens=64), batch_size=256, seed=seed)
    rows = load_prompts(TASK, "eval").select(range(problems))
    model = load_model(model_folder, dtype="float32")
    result = evaluate(
        model,
        tokenizer,
        rows,
        settings,
        output / "eval" / arm,
        model_name=arm,
        label=f"evaluate {LABELS[arm]}",
    )
    return {key: result[key] for key in (*ACCURACY, *TEXTS)}


def _cost(folder: Path) -> dict[str, float | None]:
    """Median seconds (teacher + student + optimiser) and transient memory of an arm's updates."""
    records = read_metrics(folder / METRICS_FILE)
    if not records:
        return {"seconds_per_update": None, "transient_mb": None}
    seconds = [sum(record[part] for part in UPDATE_PARTS) for record in records]
    memory = [record["memory/transient_mb"] for record in records if "memory/transient_mb" in record]
    return {
        "seconds_per_update": statistics.median(seconds),
        "transient_mb": statistics.median(memory) if memory else None,
    }


def _claim(output: Path, settings: dict[str, Any]) -> None:
    check_foreign(output, SETTINGS_FILE, ())
    file = output / SETTINGS_FILE
    try:
        is_other = file.exists() and json.loads(file.read_text(encoding="utf-8")) != settings
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): choose another --output or delete it") from error
    if is_other:
        raise UserError(f"{output} holds a demo with other settings: choose another --output or delete it")
    write_whole(file, json.dumps(settings, indent=2) + "\n")
