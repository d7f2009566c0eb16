"""Training with a colocated engine: its weights are the student's at every step, or the run stops."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oprd.models.loading import TINY_MODELS, resolve_model
from places import SUPPORT, TINY_RECIPES

pytest.importorskip("vllm")

WORKER = SUPPORT / "vllm_worker.py"
COLOCATED = ["--use_vllm", "true", "--max_steps", "6", "--warmup_steps", "0"]
GROUPS = [
    "--num_generations",
    "2",
    "--per_device_train_batch_size",
    "8",
    "--gradient_accumulation_steps",
    "2",
]


def train(start, recipe, folder, *flags):
    """The steps of a run of the command line."""
    argv = ["train", TINY_RECIPES / recipe, *COLOCATED, "--output_dir", folder, *flags]
    ended = start("-m", "oprd.cli", *argv)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def work(start, case, folder):
    ended = start(WORKER, case, folder)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


def test_six_colocated_steps(start, tmp_path):
    steps = train(start, "vanilla.yaml", tmp_path / "run", *GROUPS, "--max_tokens_per_micro_batch", "400")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert step["rollout/logprob_gap"] < 1e-3
        assert math.isfinite(step["loss/total"]) and step["grad_norm"] > 0
        assert step["time/sync_seconds"] > 0 and step["time/check_seconds"] > 0
        assert not any(name.startswith("output/") for name in step)
    assert steps[-1]["loss/total"] < steps[0]["loss/total"]
    after = load_file(tmp_path / "run" / "model.safetensors")
    before = load_file(Path(resolve_model("tiny:student")) / "model.safetensors")
    moved = [name for name in after if not torch.equal(after[name].float(), before[name].float())]
    assert len(moved) > 30 and "lm_head.weight" not in moved


def test_steps_that_move_the_student_by_next_to_nothing(start, tmp_path):
    steps = train(start, "vanilla.yaml", tmp_path / "run", "--max_steps", "17", "--learning_rate", "1e-7")
    assert len(steps) == 17 and max(step["rollout/logprob_gap"] for step in steps) < 1e-5


def test_a_dry_run(start, tmp_path):
    for flags in ([], ["--output_loss", "sampled_token", "--vllm_importance_sampling_correction", "true"]):
        argv = ["train", TINY_RECIPES / "vanilla.yaml", "--dry_run", "--use_vllm", "true", *flags]
        ended = start("-m", "oprd.cli", *argv, "--output_dir", tmp_path / "run")
        assert ended.returncode == 0, ended.stderr[-3000:]
        assert "dry run: 2 steps of" in ended.stdout and not (tmp_path / "run").exists()


def test_sampled_tokens_are_weighed(start, tmp_path):
    flags = ["--vllm_importance_sampling_correction", "true", "--learning_rate", "1e-3"]
    steps = train(start, "sampled_token.yaml", tmp_path / "run", *GROUPS, *flags)
    assert len(steps) == 6
    for step in steps:
        assert 0 < step["rollout/logprob_gap"] < 1e-3
        assert math.isfinite(step["loss/output"]) and step["grad_norm"] > 0


def test_a_teacher_of_another_tokenizer(start, tmp_path):
    steps = train(start, "sampled_text.yaml", tmp_path / "run", "--learning_rate", "1e-3")
    assert len(steps) == 6
    assert all(step["rollout/logprob_gap"] < 1e-3 and step["rollout/coverage"] > 0 for step in steps)


def test_adapters_packed_batches_and_evaluation(start, tmp_path):
    found = work(start, "lora", tmp_path / "run")
    assert found["changed"] and all("lora_" in name for name in found["changed"])
    assert [entry["step"] for entry in found["evaluated"]] == [1, 2, 3]
    for entry in found["evaluated"]:
        assert math.isfinite(entry["eval_loss"])
        assert entry["eval_rollout/logprob_gap"] < 1e-3
    first, *later = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["rollout/logprob_gap"] < 1e-3
    # Later steps roll out with what the evaluation before them was handed and has checked.
    assert not any("time/sync_seconds" in step or "rollout/logprob_gap" in step for step in later)


def test_two_ranks_with_an_engine_each(start, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "oprd.cli"]
    flags = ["--use_vllm", "true", "--max_steps", "2", "--per_device_train_batch_size", "4"]
    ended = start(*launcher, "train", TINY_RECIPES / "vanilla.yaml", *flags, "--output_dir", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["rollout/logprob_gap"] < 1e-3 and step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("case", ["representation", "adapters"])
def test_two_sharded_ranks_with_an_engine_each(start, tmp_path, case):
    """Each step moves the weights far, so an engine that missed one would be told by the check."""
    worker = SUPPORT / "rank_worker.py"
    models = json.dumps({name: str(TINY_MODELS / name) for name in ("student", "teacher")})
    more = {"use_vllm": True, "scripted": False, "max_completion_length": 24, "learning_rate": 0.1}
    runs = json.dumps([["", case, more]])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker]
    ended = start(*launcher, models, tmp_path, "fsdp", runs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    steps = [json.loads(line) for line in (tmp_path / case / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(step["rollout/logprob_gap"] < 1e-4 and step["grad_norm"] > 0 for step in steps)


def test_log_probs_are_the_models_own_in_every_sampling_setting(start, tmp_path):
    assert work(start, "cuts", tmp_path / "run")["gap"] < 1e-3


@pytest.mark.parametrize(("case", "step"), [("stale", 2), ("stale_slowly", 16), ("scrambled", 1)])
def test_an_engine_of_other_weights_stops_the_run(start, tmp_path, case, step):
    ended = start(WORKER, case, tmp_path / "run")
    assert ended.returncode == 1
    (said,) = [line for line in ended.stderr.splitlines() if line.startswith("oprd: ")]
    assert said.startswith(f"oprd: the run failed: step {step}: ")
    assert "does not hold the student's weights" in said
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == step - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA a server can be handed weights")
def test_training_against_a_server_needs_cuda(start, tmp_path):
    flags = ["--use_vllm", "true", "--vllm_mode", "server", "--output_dir", tmp_path / "run"]
    ended = start("-m", "oprd.cli", "train", TINY_RECIPES / "vanilla.yaml", *flags)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("oprd: vllm_mode: server gets the student's weights")
    assert not (tmp_path / "run").exists()
