"""Rollouts that change for the worse: each sign alone, resumed or not, and a run that ends."""

import pytest
import yaml

import accuracy_recipe
from oprd.folders.recorder import read_metrics
from oprd.foundation.errors import Fault
from oprd.training.behaviour import BehaviourWatch
from oprd.training.train import parse_training_recipe, train

GOOD = {
    "rollout/truncated_share": 0.1,
    "rollout/mean_length": 100.0,
    "rollout/distinct_4": 0.9,
    "representation/cosine": 0.9,
}


def follow(watch, records, first=1):
    return [watch._count(step, values) for step, values in enumerate(records, first)]


def test_a_student_that_stays_as_it_is_is_left_alone(caplog):
    told = follow(BehaviourWatch(patience=1), [GOOD] * 20)
    assert [each for each in told if each is not None] == [""] * 4 and not caplog.records


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"rollout/truncated_share": 0.8}, "80% of rollouts do not end, and 10% did not at the start"),
        ({"rollout/mean_length": 20.0}, "responses have 20 tokens, and had 100 at the start"),
        ({"rollout/distinct_4": 0.3}, "30% of four tokens in a row are new in a rollout, and 90% were"),
        ({"representation/cosine": 0.8}, "cosine is 0.800, and was 0.900 at the start"),
    ],
)
def test_each_sign(changed, says):
    watch = BehaviourWatch(patience=2)
    told = follow(watch, [GOOD] * 5 + [GOOD | changed] * 5)
    assert says in told[-1]
    watch.check()
    follow(watch, [GOOD | changed] * 5, first=11)
    with pytest.raises(Fault, match="stop_on_collapse: 2"):
        watch.check()


@pytest.mark.parametrize(
    "changed",
    [
        {"rollout/truncated_share": 0.35},
        {"rollout/mean_length": 30.0},
        {"rollout/distinct_4": 0.6},
        {"representation/cosine": 0.86},
    ],
)
def test_changes_that_are_none_of_concern(changed):
    assert follow(BehaviourWatch(patience=1), [GOOD] * 5 + [GOOD | changed] * 5)[-1] == ""


def test_rollouts_that_were_cut_from_the_start_are_told_of_elsewhere():
    cut = GOOD | {"rollout/truncated_share": 0.95}
    assert follow(BehaviourWatch(patience=1), [cut] * 10)[-1] == ""


def test_a_resumed_run_judges_as_if_it_had_not_stopped():
    records = [GOOD] * 5 + [GOOD | {"rollout/distinct_4": 0.1}] * 8
    straight, resumed = BehaviourWatch(patience=1), BehaviourWatch(patience=1)
    follow(straight, records)
    resumed.resume([values | {"step": step} for step, values in enumerate(records[:7], 1)])
    follow(resumed, records[7:], first=8)
    for watch in (straight, resumed):
        with pytest.raises(Fault, match="step 10: 10% of four tokens"):
            watch.check()


def test_a_run_that_falls_apart_is_stopped(tmp_path):
    """Without problems to grade: a learning rate that destroys the student."""
    recipe = {key: value for key, value in accuracy_recipe.RECIPE.items() if not key.startswith("accuracy")}
    keys = {
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 12,
        "max_steps": 40,
        "stop_on_collapse": 1,
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | keys))
    with pytest.raises(Fault, match="stopped with a checkpoint"):
        train(*parse_training_recipe(tmp_path / "recipe.yaml"))
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert last in (10, 15, 20) and (tmp_path / "run" / f"checkpoint-{last}").is_dir()
