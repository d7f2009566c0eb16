"""The study on real models: arms of a pair, one after another, each a run of `oprd train`.

    python benchmarks/study.py --pair same-origin                     # the arms that have no result yet
    python benchmarks/study.py --pair same-origin --arms oprd top_16  # these alone
    python benchmarks/study.py --table                                # what is there, of every pair

Every arm has the same prompts, batch and steps, and its learning rate from the same grid: the rate with the
most right answers after a run of `TUNING_STEPS` steps, on problems that are counted nowhere else. An arm with
a result in results/study/ is done, and skipped. One that was stopped goes on from its last checkpoint.
study_arms.py has the pairs and arms; study_report.py makes the tables and plots.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from harness import hardware
from study_arms import PAIRS, Arm, Keys, Pair
from study_report import RESULTS, table

from oprd import load_model, load_prompts, load_tokenizer
from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.problems import EvalSettings
from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.rollouts.generation import Sampling

ROOT, RUNS = Path(__file__).parents[1], Path("runs") / "study"
RATES, TUNING_STEPS = ("3e-5", "1e-4", "3e-4"), 12
SEEN = 64  # the first test problems, on which rates are chosen and, with half of them, curves drawn
TEMPLATES = 128  # problems of other templates
EVALUATION = EvalSettings(samples=1, sampling=Sampling(max_new_tokens=48, temperature=0), batch_size=32)
CURVE = {
    "accuracy": "eval/avg_at_k",
    "low": "eval/ci95_low",
    "high": "eval/ci95_high",
    "length": "rollout/mean_length",
    "truncated": "rollout/truncated_share",
    "cosine": "representation/cosine",
    "loss": "loss/total",
}


@dataclass(frozen=True)
class Models:
    """The student and the teacher of an arm: what was given by flag, else the pair's, else the recipe's."""

    student: str
    teacher: str

    @classmethod
    def of(cls, pair: Pair, arm: Arm, student: str | None, teacher: str | None) -> "Models":
        recipe = yaml.safe_load((ROOT / arm.recipe).read_text())
        return cls(
            student or pair.student or recipe["model_name_or_path"],
            teacher or pair.teacher or recipe["teacher_model_name_or_path"],
        )

    @property
    def keys(self) -> Keys:
        """The keys of a recipe that name them."""
        return {"model_name_or_path": self.student, "teacher_model_name_or_path": self.teacher}


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    pair: str
    name: str
    rate: str
    seed: int
    tuning: bool

    @property
    def arm(self) -> Arm:
        """What it runs."""
        return PAIRS[self.pair].arms[self.name]

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return (
            RUNS / self.pair / ("tuning" if self.tuning else "runs") / f"{self.name}-{self.rate}-{self.seed}"
        )

    @property
    def result(self) -> Path:
        """The file of its result."""
        if self.tuning:
            return RESULTS / self.pair / "tuning" / f"{self.name}-{self.rate}.json"
        return RESULTS / self.pair / f"{self.name}-{self.seed}.json"

    def train(self, models: Models) -> None:
        """Train to the end, or from the last checkpoint to the end."""
        if self.arm.sft:
            self._fine_tune(models)
            return
        keys = dict(self.arm.keys) | models.keys | {"learning_rate": self.rate, "seed": str(self.seed)}
        if self.arm.bridge:
            keys["bridge"] = str(self._bridge(models))
        if self.tuning:
            keys |= {"max_steps": str(TUNING_STEPS), "accuracy_dataset_name": "null"}
        oprd("train", self.arm.recipe, self.folder, keys)

    def _bridge(self, models: Models) -> Path:
        """The folder of its bridge, which is fitted at its first use."""
        assert self.arm.bridge is not None
        folder = RUNS / self.pair / "bridges" / self.arm.bridge
        keys = dict(PAIRS[self.pair].bridges[self.arm.bridge]) | models.keys
        if not (folder / "report.json").exists():
            oprd("bridge", "recipes/laptop/qwen-bridge.yaml", folder, keys)
        return folder

    def _fine_tune(self, models: Models) -> None:
        """Supervised fine-tuning on samples of the teacher, as many as the others take of the student."""
        recipe = yaml.safe_load((ROOT / self.arm.recipe).read_text())
        batch, length = recipe["per_device_train_batch_size"], recipe["max_completion_length"]
        samples = RUNS / self.pair / "teacher-samples"
        words = ["--model", models.teacher, "--data", recipe["dataset_name"], "--split", "train"]
        words += ["--limit", str(batch * recipe["max_steps"]), "--samples", "1", "--temperature", "1"]
        words += ["--top_p", "1", "--max_new_tokens", str(length), "--output", str(samples)]
        call("-m", "oprd.cli", "eval", *words)
        steps = TUNING_STEPS if self.tuning else recipe["max_steps"]
        call(
            *(str(ROOT / "examples" / "make_teacher.py"), "--model", models.student),
            *("--solutions", str(samples / "samples.jsonl"), "--output", str(self.folder)),
            *("--steps", str(steps), "--batch_size", str(batch), "--learning_rate", self.rate),
            *("--seed", str(self.seed)),
        )

    def record(self) -> None:
        """Write what it came to; of a tuning run only this is kept."""
        found = {"arm": self.name, "learning_rate": self.rate, "seed": self.seed, "curve": self.curve()}
        if self.tuning:
            found["accuracy"] = seen_accuracy(self.folder)
        else:
            found |= {"cosines": cosines(self.folder), "held_out": held_out(self.folder)}
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.result.write_text(json.dumps(found | hardware(), indent=1) + "\n")
        if self.tuning:
            shutil.rmtree(self.folder)

    def curve(self) -> list[dict[str, float]]:
        """By step, from 1: the seconds that training took so far, and what was measured."""
        if self.arm.sft:
            return [json.loads((self.folder / "trained.json").read_text())]
        seconds, points = 0.0, []
        for record in read_metrics(self.folder / METRICS_FILE):
            seconds += sum(value for name, value in record.items() if name.startswith("time/"))
            point = {short: round(record[name], 5) for short, name in CURVE.items() if name in record}
            points.append({"step": record["step"], "seconds": round(seconds, 1), **point})
        return points


def call(*words: str) -> None:
    """Run a Python command to its end."""
    subprocess.run([sys.executable, *words], check=True)


def oprd(command: str, recipe: str, folder: Path, keys: Keys) -> None:
    """Run one of oprd's commands into a folder."""
    flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
    call("-m", "oprd.cli", command, str(ROOT / recipe), "--output_dir", str(folder), *flags)


def cosines(folder: Path) -> dict[int, list[float]]:
    """The cosine of each layer, ascending, at every tenth step."""
    name = "representation/cosine_layer_"
    found = {}
    for record in read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else ():
        layers = sorted(
            (int(key.removeprefix(name)), value) for key, value in record.items() if key.startswith(name)
        )
        if layers and (record["step"] == 1 or record["step"] % 10 == 0):
            found[record["step"]] = [round(value, 4) for _, value in layers]
    return found


def held_out(folder: Path | str) -> dict[str, dict[str, Any]]:
    """Greedy answers to problems that no choice was made on: `test` behind `SEEN`, and `test-templates`."""
    test = load_prompts("word-problems", "test")
    templates = load_prompts("word-problems", "test-templates").select(range(TEMPLATES))
    return answers(folder, {"test": test.select(range(SEEN, len(test))), "test-templates": templates})


def seen_accuracy(folder: Path) -> float:
    """The share of right greedy answers to the problems on which rates are chosen."""
    seen = load_prompts("word-problems", "test").select(range(SEEN))
    return answers(folder, {"seen": seen})["seen"]["avg_at_k"]


def answers(folder: Path | str, splits: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What greedy answers to the problems of each split come to."""
    model, tokenizer = load_model(str(folder), dtype="float32").eval(), load_tokenizer(str(folder))
    kept = ("avg_at_k", "ci95", "mean_length", "truncated_share", "no_answer_share", "num_problems")
    summaries = {name: evaluate(model, tokenizer, rows, EVALUATION) for name, rows in splits.items()}
    return {name: {key: summary[key] for key in kept} for name, summary in summaries.items()}


def best_rate(pair: str, name: str) -> str:
    """The learning rate with most right answers at the end of tuning, once all have a result."""
    name = PAIRS[pair].arms[name].rate_of or name
    results = [Run(pair, name, rate, 0, tuning=True).result for rate in RATES]
    ends = [json.loads(path.read_text())["accuracy"] for path in results]
    return RATES[max(range(len(RATES)), key=ends.__getitem__)]


def runs(pair: str, names: list[str], seeds: list[int] | None) -> Iterator[Run]:
    """The runs of these arms. An arm's rates come first: their results decide the rate of what follows."""
    for name in names:
        for rate in RATES if PAIRS[pair].arms[name].rate_of is None else ():
            yield Run(pair, name, rate, 0, tuning=True)
        for seed in seeds or ([0, 1] if name in PAIRS[pair].main else [0]):
            yield Run(pair, name, best_rate(pair, name), seed, tuning=False)


def measure_ends(pair: str, models: Models) -> None:
    """The untouched student and the teacher, on the problems of the table."""
    for name, model in (("student", models.student), ("teacher", models.teacher)):
        path = RESULTS / pair / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps({"arm": name, "held_out": held_out(model)} | hardware(), indent=1) + "\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=PAIRS)
    parser.add_argument("--arms", nargs="+", help="default: all of the pair")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0, and 1 of the main arms")
    parser.add_argument("--student", help="in place of the pair's: a folder or a Hub name")
    parser.add_argument("--teacher", help="in place of the pair's")
    parser.add_argument("--table", action="store_true", help="print what is there, and run nothing")
    given = parser.parse_args()
    if not given.table:
        if not given.pair:
            parser.error("--pair says what to run")
        pair = PAIRS[given.pair]
        for run in runs(given.pair, given.arms or list(pair.arms), given.seeds):
            models = Models.of(pair, run.arm, given.student, given.teacher)
            if not run.result.exists():
                run.train(models)
                run.record()
        measure_ends(given.pair, models)
    for name in [given.pair] if given.pair else PAIRS:
        print(f"\n{name}\n\n{table(name)}")


if __name__ == "__main__":
    main()
