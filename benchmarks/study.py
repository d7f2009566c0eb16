"""The study on real models: arms of a pair, one after another, each a run of `oprd train`.

    python benchmarks/study.py --pair same-origin                     # the arms that have no result yet
    python benchmarks/study.py --pair same-origin --arms oprd top_16  # these alone
    python benchmarks/study.py --pair same-origin --table             # what is there

Every arm has the same prompts, batch and steps, and its learning rate from the same grid: the rate with the
most right answers after `TUNING_STEPS` steps, on problems that are counted nowhere else. An arm with a result
in results/study/ is done, and skipped. One that was stopped goes on from its last checkpoint.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import hardware

from oprd import load_model, load_prompts, load_tokenizer
from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.problems import EvalSettings
from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.rollouts.generation import Sampling

ROOT = Path(__file__).parents[1]
RESULTS, RUNS = ROOT / "benchmarks" / "results" / "study", Path("runs") / "study"
RATES, TUNING_STEPS = ("3e-5", "1e-4", "3e-4"), 20
SEEN = 64  # the first test problems, on which rates are chosen and curves drawn
EVALUATION = EvalSettings(samples=1, sampling=Sampling(max_new_tokens=64, temperature=0), batch_size=32)
CURVE = {
    "accuracy": "eval/avg_at_k",
    "low": "eval/ci95_low",
    "high": "eval/ci95_high",
    "length": "rollout/mean_length",
    "truncated": "rollout/truncated_share",
    "cosine": "representation/cosine",
    "loss": "loss/total",
}
TOKENS = {"representation_weight": "0", "diagnostics_steps": "10"}


@dataclass(frozen=True)
class Pair:
    """A student, a teacher and the recipe that joins them; `arms` are the keys that each changes."""

    recipe: str
    arms: Mapping[str, Mapping[str, str]]


STATES = {
    "oprd": {},
    "oprd_mse": {"representation_loss": "mse"},
    "oprd_last": {"layers": "last"},
    "oprd_first_rows": {"positions": "first=8"},
    "oprd_last_rows": {"positions": "last=8"},
}
OUTPUTS = {
    "sampled_token": TOKENS | {"output_loss": "sampled_token"},
    "top_16": TOKENS | {"output_loss": "top_k"},
    "full_vocab": TOKENS | {"output_loss": "full_vocab"},
}
PAIRS = {
    "same-origin": Pair("recipes/laptop/same-origin.yaml", STATES | OUTPUTS),
    "pruned": Pair("recipes/laptop/pruned.yaml", {"oprd": {}, "oprd_mse": STATES["oprd_mse"]} | OUTPUTS),
}


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    pair: str
    arm: str
    rate: str
    seed: int
    steps: int | None = None  # None: those of the recipe

    @property
    def folder(self) -> Path:
        """Its run folder."""
        stage = "tuning" if self.steps else "runs"
        return RUNS / self.pair / stage / f"{self.arm}-{self.rate}-{self.seed}"

    @property
    def result(self) -> Path:
        """The file of its result."""
        name = f"{self.arm}-{self.rate}" if self.steps else f"{self.arm}-{self.seed}"
        return RESULTS / self.pair / ("tuning" if self.steps else ".") / f"{name}.json"

    def train(self, names: Mapping[str, str]) -> None:
        """Train to the end, or from the last checkpoint to the end."""
        pair = PAIRS[self.pair]
        keys = dict(pair.arms[self.arm]) | names | {"learning_rate": self.rate, "seed": str(self.seed)}
        if self.steps:
            keys |= dict.fromkeys(("max_steps", "accuracy_steps"), str(self.steps))
        flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
        command = [sys.executable, "-m", "oprd.cli", "train", str(ROOT / pair.recipe)]
        subprocess.run([*command, "--output_dir", str(self.folder), *flags], check=True)

    def record(self) -> None:
        """Write what it came to; of a tuning run only this is kept."""
        found = {"arm": self.arm, "learning_rate": self.rate, "seed": self.seed, "curve": self.curve()}
        if self.steps is None:
            found |= {"held_out": held_out(self.folder)}
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.result.write_text(json.dumps(found | hardware(), indent=1) + "\n")
        if self.steps is not None:
            shutil.rmtree(self.folder)

    def curve(self) -> list[dict[str, float]]:
        """By step, from 1: the seconds that training took so far, and what was measured."""
        seconds, points = 0.0, []
        for record in read_metrics(self.folder / METRICS_FILE):
            seconds += sum(value for name, value in record.items() if name.startswith("time/"))
            point = {short: round(record[name], 5) for short, name in CURVE.items() if name in record}
            points.append({"step": record["step"], "seconds": round(seconds, 1), **point})
        return points


def held_out(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Greedy answers to problems that no choice was made on: `test` behind `SEEN`, and `test-templates`."""
    model, tokenizer = load_model(str(folder), dtype="float32").eval(), load_tokenizer(str(folder))
    test = load_prompts("word-problems", "test")
    templates = load_prompts("word-problems", "test-templates")
    kept = ("avg_at_k", "ci95", "mean_length", "truncated_share", "no_answer_share", "num_problems")
    splits = {"test": test.select(range(SEEN, len(test))), "test-templates": templates}
    summaries = {name: evaluate(model, tokenizer, rows, EVALUATION) for name, rows in splits.items()}
    return {name: {key: summary[key] for key in kept} for name, summary in summaries.items()}


def best_rate(pair: str, arm: str) -> str:
    """The learning rate with most right answers at the end of tuning, once all have a result."""
    results = [Run(pair, arm, rate, 0, TUNING_STEPS).result for rate in RATES]
    ends = [json.loads(path.read_text())["curve"][-1]["accuracy"] for path in results]
    return RATES[max(range(len(RATES)), key=ends.__getitem__)]


def runs(pair: str, arms: list[str], seeds: list[int]) -> Iterator[Run]:
    """The runs of these arms. An arm's rates come first: their results decide the rate of what follows."""
    for arm in arms:
        for rate in RATES:
            yield Run(pair, arm, rate, 0, TUNING_STEPS)
        for seed in seeds:
            yield Run(pair, arm, best_rate(pair, arm), seed)


def table(pair: str) -> str:
    """What is there: accuracy on held-out problems, with 95 % intervals over problems."""
    lines = [
        "| arm | seed | learning rate | test | other templates | length | seconds a step |",
        "|---" * 7 + "|",
    ]
    for path in sorted((RESULTS / pair).glob("*.json")):
        found = json.loads(path.read_text())
        cells = [found["arm"], str(found["seed"]), found["learning_rate"]]
        for split in ("test", "test-templates"):
            share, (low, high) = found["held_out"][split]["avg_at_k"], found["held_out"][split]["ci95"]
            cells.append(f"{100 * share:.1f} ({100 * low:.1f}–{100 * high:.1f})")
        last = found["curve"][-1]
        cells += [f"{found['held_out']['test']['mean_length']:.1f}", f"{last['seconds'] / last['step']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--arms", nargs="+", help="default: all of the pair")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--student", help="in place of the recipe's: a folder or a Hub name")
    parser.add_argument("--teacher", help="in place of the recipe's")
    parser.add_argument("--table", action="store_true", help="print what is there, and run nothing")
    given = parser.parse_args()
    if not given.table:
        names = {"model_name_or_path": given.student, "teacher_model_name_or_path": given.teacher}
        for run in runs(given.pair, given.arms or list(PAIRS[given.pair].arms), given.seeds):
            if not run.result.exists():
                run.train({key: name for key, name in names.items() if name})
                run.record()
    print(table(given.pair))


if __name__ == "__main__":
    main()
