"""Two processes on halves of the batch do what one process does on all of it, sharded or not."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from safetensors.torch import load_file
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

import accuracy_recipe
import rank_worker
from oprd.folders.recorder import read_metrics
from oprd.foundation.foreign.transformers import loaded_whole
from oprd.training.train import parse_training_recipe, train
from random_bridge import save_random_bridge
from tiny_pair import QUICK

pytestmark = pytest.mark.xdist_group("two ranks")  # which are started once

SKIPPED = ("time/", "memory/")
EXPERTS = {
    "family": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "output_router_logits": True,  # which the loss of none of the models' own heads is to add
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_folder, student, teacher):
    tied = make_folder(1, tie_word_embeddings=True), make_folder(2, tie_word_embeddings=True)
    wide = make_folder(2, num_hidden_layers=5, hidden_size=48)
    bridge = save_random_bridge(tmp_path_factory.mktemp("bridge"), student, wide, pairs=((1, 2), (2, 5)))
    experts = make_folder(1, **EXPERTS), make_folder(2, **EXPERTS)
    names = "student", "teacher", "tied", "tied_teacher", "wide", "bridge", "experts", "experts_teacher"
    return dict(zip(names, (student, teacher, *tied, wide, bridge, *experts), strict=True))


def launch(models, output, mode, runs):
    """The worker on two ranks, which makes every run: its folder below `output`, its case, its settings."""
    worker = Path(rank_worker.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(worker), json.dumps(models), str(output), mode, json.dumps(runs)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{worker.parent}:{os.getenv('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


# Such an epsilon keeps Adam from making steps of a gradient's rounding.
ADAM = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "save_strategy": "steps", "save_steps": 2}
BEST = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1} | {
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "learning_rate": 1.0,  # so large that the loss rises after the first step
}
ROLLED_OUT = ("accumulated", "tied", "adapters")
RESUMED = ("output", "tied", "adapters", "experts")
BEST_OF = ("adapters", "experts")
# In half precision rounding moves a token in or out of a top-k support now and then: nothing may hang on it.
SMOOTH = {"bf16": True, "output_loss": "full_vocab"}
HALF = ("representation", "output")
FLIPS = "output/top_k_overlap"


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, models):
    """`on_two_ranks(mode)`: what two ranks made in one launch; `resumed` goes on from what one rank saved.

    fsdp makes all runs. ddp leaves out those that are saved, halved or graded, which `ddp saved` makes.
    """

    @cache
    def made(mode):
        folder = tmp_path_factory.mktemp(mode.replace(" ", "-"))
        runs = []
        if mode in ("ddp", "fsdp"):
            runs += [("plain", case, {}) for case in rank_worker.CASES]
            runs += [("rolled_out", case, {"scripted": False}) for case in ROLLED_OUT]
        if mode in ("ddp saved", "fsdp"):
            runs += rare_runs(folder)
        launch(models, folder, mode.partition(" ")[0], runs)
        return folder

    def rare_runs(folder):
        for case in RESUMED:
            rank_worker.run_case(case, models, folder / "resumed", **ADAM | {"max_steps": 2})
        runs = [("saved", case, ADAM | {"max_steps": 2}) for case in RESUMED]
        runs += [("resumed", case, ADAM | {"max_steps": 4, "resume": True}) for case in RESUMED]
        runs += [("best", case, BEST) for case in BEST_OF]
        runs += [("half", case, SMOOTH) for case in HALF]
        runs += [("equal", case, SMOOTH | {"teacher": "student"}) for case in HALF]
        (folder / "recipe.yaml").write_text(yaml.safe_dump(accuracy_recipe.RECIPE))
        halved = {"recipe": str(folder / "recipe.yaml"), "flags": ["--per_device_train_batch_size", "2"]}
        return [*runs, ("accuracy", "recipe", halved)]

    return made


@pytest.fixture(params=["ddp", "fsdp"])
def two_ranks(on_two_ranks, request):
    return on_two_ranks(request.param)


@pytest.fixture(params=["fsdp", pytest.param("ddp saved", marks=pytest.mark.drill)])
def saved_by_two_ranks(on_two_ranks, request):
    return on_two_ranks(request.param)


def weights_in(folder):
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def same_metrics(folder, other, rel, but=()):
    """Every number of every step but the costs, and `but`; returns the steps."""
    steps, others = (read_metrics(path / "metrics.jsonl") for path in (folder, other))
    for one, two in zip(steps, others, strict=True):
        names = {name for name in one if not name.startswith(SKIPPED)}
        assert names == {name for name in two if not name.startswith(SKIPPED)}
        for name in names - set(but):
            assert two[name] == pytest.approx(one[name], rel=rel, abs=1e-7), name
    return steps


def same_weights(folder, other, atol=1e-6):
    ours, theirs = weights_in(folder), weights_in(other)
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        torch.testing.assert_close(theirs[name], one, rtol=1e-5, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("case", rank_worker.CASES)
def test_two_processes_equal_one(two_ranks, tmp_path, models, case):
    trainer = rank_worker.run_case(case, models, tmp_path)
    assert trainer.accelerator.num_processes == 1
    steps = same_metrics(two_ranks / "plain" / case, tmp_path / case, rel=1e-5)
    assert [record["step"] for record in steps] == [1, 2, 3]
    if case.startswith("idle_rank"):
        assert [record["rollout/left_out"] for record in steps] == [2, 2, 2]
        assert all(record["grad_norm"] > 0 for record in steps)
    same_weights(tmp_path / case, two_ranks / "plain" / case)


FROM_RANK_0 = ("output", "tied", "bridge", "adapters")


@pytest.mark.drill
def test_rank_0_may_load_for_all(tmp_path, models):
    launch(models, tmp_path, "fsdp_from_rank_0", [("sharded", case, {}) for case in FROM_RANK_0])
    for case in FROM_RANK_0:
        rank_worker.run_case(case, models, tmp_path)
        same_metrics(tmp_path / "sharded" / case, tmp_path / case, rel=1e-5)
        same_weights(tmp_path / case, tmp_path / "sharded" / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ROLLED_OUT)
def test_sharded_models_roll_out_like_whole_ones(on_two_ranks, case):
    whole, sharded = (on_two_ranks(mode) / "rolled_out" / case for mode in ("ddp", "fsdp"))
    steps = same_metrics(sharded, whole, rel=1e-5)
    assert len({record["rollout/mean_length"] for record in steps}) > 1
    same_weights(whole, sharded)


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF)
def test_in_half_precision_gradients_are_summed_in_float32(saved_by_two_ranks, tmp_path, models, case):
    rank_worker.run_case(case, models, tmp_path, **SMOOTH)
    same_metrics(saved_by_two_ranks / "half" / case, tmp_path / case, rel=0.03, but=[FLIPS])


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF)
def test_in_half_precision_a_student_that_equals_its_teacher_stays(saved_by_two_ranks, models, case):
    steps = read_metrics(saved_by_two_ranks / "equal" / case / "metrics.jsonl")
    assert [(record["loss/total"], record["grad_norm"]) for record in steps] == [(0, 0)] * 3
    same_weights(saved_by_two_ranks / "equal" / case, Path(models["student"]), atol=0)


ZERO = {
    "zero2": ("output", "tied", "bridge", "packed_at_once"),
    "zero3": ("representation", "accumulated", "adapters_through_bridge", "packed_at_once"),
}


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("mode", ZERO)
def test_deepspeed_equals_one_process(tmp_path, models, mode):
    launch(models, tmp_path, mode, [(mode, case, {}) for case in ZERO[mode]])
    for case in ZERO[mode]:
        rank_worker.run_case(case, models, tmp_path)
        same_metrics(tmp_path / mode / case, tmp_path / case, rel=1e-5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, models):
    """Four steps on one rank, without a stop."""
    folder = tmp_path_factory.mktemp("straight")
    for case in RESUMED:
        rank_worker.run_case(case, models, folder, **ADAM | {"max_steps": 4})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_one_rank_resumes_what_two_saved(saved_by_two_ranks, tmp_path, models, straight, case):
    shutil.copytree(saved_by_two_ranks / "saved" / case, tmp_path / case)
    rank_worker.run_case(case, models, tmp_path, **ADAM | {"max_steps": 4, "resume": True})
    same_run(tmp_path / case, straight / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", RESUMED)
def test_two_ranks_resume_what_one_saved(saved_by_two_ranks, straight, case):
    same_run(saved_by_two_ranks / "resumed" / case, straight / case)


def same_run(folder, straight):
    steps = same_metrics(folder, straight, rel=1e-5)
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    same_weights(straight, folder, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", BEST_OF)
@pytest.mark.parametrize("mode", ["alone", "fsdp", pytest.param("ddp saved", marks=pytest.mark.drill)])
def test_the_best_model_is_taken_up_in_the_end(on_two_ranks, tmp_path, models, mode, case):
    if mode == "alone":
        rank_worker.run_case(case, models, tmp_path, **BEST)
    run = tmp_path / case if mode == "alone" else on_two_ranks(mode) / "best" / case
    first, last = (run / f"checkpoint-{step}" for step in (1, 3))
    state = json.loads((last / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(first)
    best, worst, final = map(weights_in, (first, last, run))
    assert final.keys() == best.keys()
    for name, weight in best.items():
        assert torch.equal(final[name], weight), name
    assert any(not torch.equal(worst[name], weight) for name, weight in best.items())


def accuracy(folder):
    (record,) = read_metrics(folder / "metrics.jsonl")
    return {name: value for name, value in record.items() if name.startswith("eval/")}


def test_two_ranks_measure_the_accuracy_that_one_does(saved_by_two_ranks, tmp_path):
    """15 responses: 8 for one rank and 7 for the other, two at a time instead of four."""
    flags = ["--output_dir", str(tmp_path / "one")]
    train(*parse_training_recipe(saved_by_two_ranks / "recipe.yaml", flags))
    one, two = (accuracy(folder) for folder in (tmp_path / "one", saved_by_two_ranks / "accuracy"))
    assert two == one
    assert one.keys() == {
        "eval/avg_at_k",
        "eval/ci95_low",
        "eval/ci95_high",
        "eval/best_at_k",
        "eval/mean_length",
        "eval/no_answer_share",
    }
    assert 0 < one["eval/avg_at_k"] < one["eval/best_at_k"]


@pytest.mark.drill
def test_one_process_told_to_shard_says_that_it_does_not_and_resumes(tmp_path, student, teacher):
    names = {"model_name_or_path": student, "teacher_model_name_or_path": teacher, "dataset_name": "tiny"}
    keys = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names | keys))
    for steps in (2, 3):
        done = subprocess.run(
            [sys.executable, "-m", "oprd.cli", "train", tmp_path / "recipe.yaml", "--max_steps", str(steps)],
            env=os.environ | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("FSDP is asked for, but nothing is sharded") == 1
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 3


def test_one_rank_loads_a_model_whole_under_zero3():
    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    set_hf_deepspeed_config(config)
    try:
        with loaded_whole():
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()
