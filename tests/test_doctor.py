"""`oprd doctor` and `oprd train --dry_run`: what they say, what they exit with, and what they leave."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from oprd import cli, machine
from oprd.doctor import examine, longest_rollout
from oprd.knobs import first_knob
from oprd.machine import Machine
from oprd.memory_plan import plan_memory
from oprd.meters import MB
from oprd.train import parse_training_recipe

RECIPE = {
    "model_name_or_path": "tiny:student",
    "teacher_model_name_or_path": "tiny:teacher",
    "max_steps": 2,
    "num_generations": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 16,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
}
TOO_LONG = {"per_device_train_batch_size": 128, "max_completion_length": 16_384}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        data, path = tmp_path / "prompts.jsonl", tmp_path / "recipe.yaml"
        data.write_text(
            "".join(json.dumps({"prompt": f"Compute {n}+1."}) + "\n" for n in (1, 23, 456)) * 1400
        )
        keys = {"output_dir": str(tmp_path / "run"), "dataset_name": str(data)}
        path.write_text(yaml.safe_dump(RECIPE | keys | changes))
        return str(path)

    return write


def test_a_run_that_fits(capsys, recipe, tmp_path):
    assert cli.run(["doctor", recipe()]) == 0
    out = capsys.readouterr().out
    assert "tiny:student learns from tiny:teacher" in out and "it fits" in out
    for part in ("student's weights", "optimiser's state", "student's activations", "sum"):
        assert part in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "recipe.yaml"]


@pytest.mark.slow
def test_a_run_that_does_not_fit(capsys, recipe):
    assert cli.run(["doctor", recipe(**TOO_LONG), "--json"]) == 2
    out, error = capsys.readouterr()
    last = error.strip().splitlines()[-1]
    assert "does not fit; first turn" in last and "saves" in last and "Traceback" not in error
    found = json.loads(out)
    assert found["is_well"] is False and found["peak_mb"] > found["free_mb"]
    assert found["first_knob"]["peak_mb"] < 0.95 * found["peak_mb"]
    assert found["peak_mb"] == max(found["rollout_peak_mb"], found["update_peak_mb"])
    assert sum(found["parts_mb"]["update"].values()) == pytest.approx(found["update_peak_mb"])


def test_flags_override_and_mistakes_are_told(capsys, recipe):
    assert cli.run(["doctor", recipe(), "--json", "--max_completion_length", "32"]) == 0
    assert "up to 32 tokens" in capsys.readouterr().out
    for flags, says in (
        (["--layers", "9"], "layer 9"),
        (["--colour", "red"], "--colour"),
        (["--model_name_or_path", "./nowhere"], "./nowhere"),
        (["--max_prompt_length", "2"], "2"),
    ):
        assert cli.run(["doctor", recipe(), *flags]) == 2
        assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_ranks_share_a_sharded_run(recipe):
    run, config = parse_training_recipe(recipe())
    assert examine(run, config, ranks=4).machine.ranks == 4


@pytest.mark.parametrize(
    ("changes", "room", "keys"),
    [
        ({}, 0.95, "gradient_checkpointing: true"),
        (
            {"gradient_checkpointing": True, "output_loss": "full_vocab"},
            0.9,
            "per_device_train_batch_size: 2, gradient_accumulation_steps: 4",
        ),
        (
            {"gradient_checkpointing": True, "per_device_train_batch_size": 1},
            0.8,
            "max_completion_length: 200",
        ),
        (
            {"max_tokens_per_micro_batch": 2000, "gradient_checkpointing": True},
            0.8,
            "max_tokens_per_micro_batch: 1000",
        ),
    ],
    ids=str,
)
def test_the_first_knob_is_the_cheapest_that_is_enough(recipe, changes, room, keys):
    run, config = parse_training_recipe(recipe(max_completion_length=400, **changes))
    longest, _ = longest_rollout(run, config)
    here = Machine(torch.device("cpu"), 0, 0)
    plan = plan_memory(run.model_name_or_path, config, longest, here)
    here = replace(here, free_bytes=int(room * plan.peak_mb * MB))
    knob = first_knob(run.model_name_or_path, config, longest, here, plan)
    assert knob.keys == keys and knob.peak_mb < plan.peak_mb


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_tokens_per_micro_batch": 60, "output_loss": "top_k", "output_top_k": 4},
        {
            "teacher_model_name_or_path": "tiny:tokenizer-teacher",
            "representation_weight": "0",
            "output_loss": "sampled_text",
        },
        {"gradient_accumulation_steps": 4, "num_generations": 4, "gradient_checkpointing": True},
        {"representation_weight": "0=1,1=0", "output_loss": "full_vocab", "output_weight": "0=0,1=1"},
    ],
    ids=str,
)
def test_a_dry_run_tries_the_longest_rollouts_and_leaves_nothing(capsys, recipe, tmp_path, changes):
    path = recipe(**changes)
    assert cli.run(["train", path, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "2 steps of" in out and "no run was started" in out
    if sys.platform == "linux":
        assert "memory/peak_mb" in out and "memory/rollout_peak_mb" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.parametrize("megabytes", [800, 2500])  # before the models are there, and in the first update
def test_running_out_of_memory_names_the_first_knob(recipe, megabytes):
    path = recipe(per_device_train_batch_size=32, max_completion_length=2048)
    room = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({megabytes}_000_000,) * 2)"
    script = f"{room}; import sys; from oprd import cli; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "train", path, "--dry_run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "out of memory at the longest rollout" in last
    assert "first turn gradient_checkpointing: true" in last


@pytest.mark.parametrize(
    ("limit", "free"), [("3000000000", 2_200_000_000), ("max", math.inf), (None, math.inf)]
)
def test_a_container_may_have_less_than_its_machine(monkeypatch, tmp_path, limit, free):
    monkeypatch.setattr(machine, "CONTAINER", tmp_path)
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("1000000000\n")
        (tmp_path / "memory.stat").write_text("anon 700000000\ninactive_file 200000000\n")
    assert machine._container_memory() == free
