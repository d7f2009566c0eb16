"""The study of real models: its arms are runs that can be started, and differ in nothing but their keys."""

import json
import sys

import pytest
import yaml

from oprd.training.train import parse_training_recipe
from places import BENCHMARKS, ROOT

sys.path.insert(0, str(BENCHMARKS))

import study
import study_arms
import study_report

ARMS = [(pair, name) for pair, each in study_arms.PAIRS.items() for name in each.arms]
SHARED = (
    *("dataset_name", "num_generations", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_completion_length", "bf16", "accuracy_dataset_name", "accuracy_steps", "accuracy_problems"),
)


@pytest.mark.parametrize(("pair", "name"), ARMS)
def test_arms_are_recipes_that_can_be_read(pair, name):
    arm = study_arms.PAIRS[pair].arms[name]
    keys = dict(arm.keys) | ({"bridge": "runs/bridge"} if arm.bridge else {})
    flags = [word for key, value in keys.items() for word in (f"--{key}", value)]
    _, config = parse_training_recipe(str(ROOT / arm.recipe), flags)
    first = yaml.safe_load(
        (ROOT / next(iter(study_arms.PAIRS["same-origin"].arms.values())).recipe).read_text()
    )
    recipe = yaml.safe_load((ROOT / arm.recipe).read_text())
    assert [recipe[key] for key in SHARED] == [first[key] for key in SHARED]
    assert config.max_steps == (120 if "long" in name else first["max_steps"])


def test_rates_come_before_the_run_that_they_decide(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    found = []
    for run in study.runs("same-origin", ["oprd", "oprd_last"], None):
        found.append((run.name, run.rate, run.seed, run.tuning))
        if run.tuning:  # 3e-5 and 1e-4 are equally good
            run.result.parent.mkdir(parents=True, exist_ok=True)
            run.result.write_text(json.dumps({"accuracy": 0.1 if run.rate == "3e-4" else 0.2}))
    tuned = [(rate, 0, True) for rate in study.RATES]
    assert found == [
        *[("oprd", *run) for run in tuned],
        *[("oprd", "3e-5", seed, False) for seed in (0, 1)],
        *[("oprd_last", *run) for run in tuned],
        ("oprd_last", "3e-5", 0, False),
    ]


def test_the_table_has_a_row_for_each_result(tmp_path, monkeypatch):
    monkeypatch.setattr(study_report, "RESULTS", tmp_path)
    split = {"avg_at_k": 0.5, "ci95": [0.25, 0.75], "mean_length": 30.0}
    held_out = {"held_out": {"test": split, "test-templates": split}}
    run = {"arm": "oprd", "learning_rate": "1e-4", "seed": 0, "curve": [{"step": 2, "seconds": 9.0}]}
    (tmp_path / "pair").mkdir()
    for name, content in (("oprd-0", held_out | run), ("student", {"arm": "student"} | held_out)):
        (tmp_path / "pair" / f"{name}.json").write_text(json.dumps(content))
    *_, first, second = study_report.table("pair").splitlines()
    assert first == "| student |  |  | 50.0 (25.0–75.0) | 50.0 (25.0–75.0) | 30.0 |  |"
    assert second == "| oprd | 0 | 1e-4 | 50.0 (25.0–75.0) | 50.0 (25.0–75.0) | 30.0 | 4.5 |"
