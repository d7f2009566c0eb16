"""Accuracy during a run: shared over ranks, in the room of a step's rollouts, and left to itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_pair import QUICK

from oprd.errors import UserError
from oprd.evaluation import shared
from oprd.folder.recorder import read_metrics
from oprd.train import parse_training_recipe, train

PROBLEMS, SAMPLES = 5, 3
RECIPE = QUICK | {
    "model_name_or_path": "tiny:student",
    "teacher_model_name_or_path": "tiny:teacher",
    "dataset_name": "tiny",
    "accuracy_dataset_name": "tiny",
    "accuracy_steps": 1,
    "accuracy_problems": PROBLEMS,
    "accuracy_samples": SAMPLES,
    "max_completion_length": 48,
    "learning_rate": 0.0,  # rollouts differ with the ranks, and so would the students
    "max_steps": 1,
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def accuracy(folder):
    (record,) = read_metrics(folder / "metrics.jsonl")
    return {name: value for name, value in record.items() if name.startswith("eval/")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_measure_what_one_does(tmp_path, recipe, mode):
    """15 responses: 8 for one rank and 7 for the other, two at a time instead of four."""
    worker = Path(__file__).with_name("train_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = ["--output_dir", str(tmp_path / "two"), "--per_device_train_batch_size", "2"]
    done = subprocess.run(
        [*command, str(worker), mode, str(recipe), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    one = accuracy(train(*parse_training_recipe(recipe, ["--output_dir", str(tmp_path / "one")])))
    assert accuracy(tmp_path / "two") == one
    assert one.keys() == {"eval/avg_at_k", "eval/best_at_k", "eval/mean_length"}
    assert 0 < one["eval/avg_at_k"] < one["eval/best_at_k"]


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
    for name, more in {"with": [], "without": ["--accuracy_steps", "9"]}.items():
        train(*parse_training_recipe(recipe, ["--output_dir", str(tmp_path / name), *flags, *more]))
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without")]
    for one, other in zip(*records, strict=True):
        losses = [name for name in other if name.startswith(("loss/", "rollout/", "representation/"))]
        assert [one[name] for name in losses] == [other[name] for name in losses]
        assert not any(name.startswith("eval/") for name in other) and one["eval/mean_length"] > 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)


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
