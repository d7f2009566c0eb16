"""Accuracy during a run: in the room of a step's rollouts, and left to itself.

Two ranks share it in test_trainer_distributed.py.
"""

import logging
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from accuracy_recipe import RECIPE
from oprd.evaluation import shared
from oprd.folders.recorder import read_metrics
from oprd.foundation.errors import UserError
from oprd.training.train import parse_training_recipe, train


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--gradient_accumulation_steps", "2"], [8, 7]),
        (["--per_device_train_batch_size", "6", "--num_generations", "2"], [6, 6, 3]),
        (["--gradient_accumulation_steps", "8"], [15]),
    ],
)
def test_no_more_responses_at_a_time_than_a_step_has_rollouts(tmp_path, recipe, monkeypatch, flags, sizes):
    drawn, generate = [], shared.generate
    monkeypatch.setattr(shared, "generate", lambda *a: drawn.append(len(a[2])) or generate(*a))
    train(*parse_training_recipe(recipe, ["--output_dir", str(tmp_path / "run"), *flags]))
    assert drawn == sizes


def test_a_run_is_the_same_with_and_without(tmp_path, recipe):
    flags = ["--max_steps", "2", "--learning_rate", "1e-3", "--gradient_accumulation_steps", "2"]
    for name in ("with", "without"):
        run, config = parse_training_recipe(recipe, ["--output_dir", str(tmp_path / name), *flags])
        train(run if name == "with" else replace(run, accuracy_dataset_name=None), config)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without")]
    for one, other in zip(*records, strict=True):
        losses = [name for name in other if name.startswith(("loss/", "rollout/", "representation/"))]
        assert [one[name] for name in losses] == [other[name] for name in losses]
        assert not any(name.startswith("eval/") for name in other) and one["eval/mean_length"] > 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accuracy_is_measured_at_the_first_and_last_step_too_and_told(tmp_path, recipe, caplog):
    flags = ["--max_steps", "5", "--accuracy_steps", "3", "--accuracy_problems", "2"]
    with caplog.at_level(logging.INFO, "oprd"):
        train(*parse_training_recipe(recipe, ["--output_dir", str(tmp_path / "run"), *flags]))
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/avg_at_k" in r]
    assert [record["step"] for record in records] == [1, 3, 5]
    told = [message for message in caplog.messages if " interval " in message]
    for record, line in zip(records, told, strict=True):
        shares = [record[f"eval/{name}"] for name in ("avg_at_k", "ci95_low", "ci95_high")]
        assert shares[1] <= shares[0] <= shares[2]
        found = "step {}: accuracy {:.1%}, 95 % interval {:.1%}–{:.1%}, of 2 problems × 3 samples"
        assert line == found.format(record["step"], *shares)


def test_problems_without_an_answer_are_refused(tmp_path, recipe):
    (tmp_path / "problems.jsonl").write_text('{"prompt": "What is 1 + 1?"}\n')
    flags = [
        "--output_dir",
        str(tmp_path / "run"),
        "--accuracy_dataset_name",
        str(tmp_path / "problems.jsonl"),
    ]
    with pytest.raises(UserError, match="row 0 has no reference answer"):
        train(*parse_training_recipe(recipe, flags))
