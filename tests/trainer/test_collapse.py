"""Accuracy that falls beyond its interval: told with its cause, ended if asked, and the best model kept."""

import json
import logging

import pytest
import torch
import yaml
from safetensors.torch import load_file

import accuracy_recipe
from oprd.folders.recorder import read_metrics
from oprd.foundation.errors import Fault, UserError
from oprd.models.loading import load_model
from oprd.training.collapse import CollapseWatch
from oprd.training.train import parse_training_recipe, train


def measured(accuracy, cosine=None, low=0.3, no_answer=0.0):
    values = {"eval/avg_at_k": accuracy, "eval/ci95_low": low, "eval/no_answer_share": no_answer}
    return values | ({} if cosine is None else {"representation/cosine": cosine})


def follow(watch, records):
    for step, values in enumerate(records, 1):
        watch.observe(step, values)


def test_a_fall_within_the_interval_is_none(caplog):
    follow(CollapseWatch(64, patience=1), [measured(0.5), measured(0.3), measured(0.31)])
    assert not caplog.records


@pytest.mark.parametrize(
    ("cosines", "cause"),
    [
        (
            (0.5, 0.9),
            r"Better alignment, worse behaviour \(.*from 0\.500 to 0\.900\): compare the last layer",
        ),
        ((0.9, 0.5), r"Alignment fell too \(.*from 0\.900 to 0\.500\): lower learning_rate"),
        ((None, None), r"Lower learning_rate, or stop earlier"),
    ],
)
def test_a_fall_is_told_with_its_cause(cosines, cause):
    watch = CollapseWatch(64, patience=1)
    with pytest.raises(Fault, match=r"step 2: accuracy is 10\.0% and was 50\.0% at step 1\. " + cause):
        follow(watch, [measured(0.5, cosines[0]), measured(0.1, cosines[1])])
        watch.check()


def test_alignment_is_the_mean_of_the_steps_since_the_measurement_before():
    watch = CollapseWatch(64, patience=1)
    steps = [
        {"representation/cosine": 0.2},
        measured(0.5, 0.4),
        {"representation/cosine": 0.5},
        measured(0.1, 0.7),
    ]
    follow(watch, steps)
    with pytest.raises(Fault, match=r"step 4: .* at step 2\..*from 0\.300 to 0\.600"):
        watch.check()


def test_answers_that_are_no_longer_stated(caplog):
    watch = CollapseWatch(64, patience=None)
    follow(watch, [measured(0.5), measured(0.4, no_answer=0.02), measured(0.4, no_answer=0.5)])
    (record,) = caplog.records
    assert "step 3: 50% of responses state an answer, and 100% did at step 1" in record.getMessage()


def test_patience_counts_measurements_in_a_row():
    records = [measured(0.5), measured(0.1), {}, measured(0.4), measured(0.1), {}, measured(0.1)]
    watch, resumed = CollapseWatch(64, patience=2), CollapseWatch(64, patience=2)
    follow(watch, records[:6])
    watch.check()
    resumed.resume([values | {"step": step} for step, values in enumerate(records[:6], 1)])
    for each in (watch, resumed):
        each.observe(7, records[6])
        with pytest.raises(Fault, match=r"stopped with a checkpoint \(stop_on_collapse: 2\)"):
            each.check()


@pytest.fixture
def destroyed(tmp_path):
    """`destroyed(**keys)`: a run whose first step is too short to matter and whose second is far too long."""

    def parse(**keys):
        changes = {
            "learning_rate": 0.3,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": 1,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 10,
            "accuracy_problems": 16,
            "accuracy_samples": 1,
            "output_dir": str(tmp_path / "run"),
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(accuracy_recipe.RECIPE | changes | keys))
        return parse_training_recipe(tmp_path / "recipe.yaml")

    return parse


def test_a_destroyed_student_is_told_stopped_and_set_aside(destroyed, tmp_path, caplog):
    folder = tmp_path / "run"
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(Fault, match=r"stopped with a checkpoint.*step 3: accuracy"),
    ):
        train(*destroyed(stop_on_collapse=2, load_best=True))
    told = [record.getMessage() for record in caplog.records if "accuracy is" in record.getMessage()]
    assert [line.partition(":")[0] for line in told] == ["step 2", "step 3"]
    assert (folder / "checkpoint-3").is_dir() and not (folder / "model.safetensors").exists()
    with pytest.raises(Fault, match="step 3: accuracy"):  # what it is resumed with does not undo it
        train(*destroyed(stop_on_collapse=2, load_best=True))
    train(*destroyed(load_best=True))
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert json.loads((folder / "best" / "best.json").read_text())["step"] == 1
    weights, start = load_file(folder / "model.safetensors"), load_model("tiny:student").state_dict()
    assert all(torch.equal(weights[name], start[name]) for name in weights)
    accuracy = read_metrics(folder / "metrics.jsonl")[0]["eval/avg_at_k"]
    assert f"value: {accuracy:.4g}" in (folder / "README.md").read_text()


def test_a_run_without_them_ends_with_its_last_model(destroyed, tmp_path):
    train(*destroyed(max_steps=2))
    weights, start = (
        load_file(tmp_path / "run" / "model.safetensors"),
        load_model("tiny:student").state_dict(),
    )
    assert not all(torch.equal(weights[name], start[name]) for name in weights)
    assert not (tmp_path / "run" / "best").exists()


def test_the_best_model_needs_problems_to_grade(destroyed):
    with pytest.raises(UserError, match="load_best goes by accuracy: set accuracy_dataset_name"):
        destroyed(accuracy_dataset_name=None, load_best=True)
