"""`oprd doctor` and `oprd train --dry_run`: what they say, what they exit with, and what they leave."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers.utils import is_bitsandbytes_available

from oprd.cli import commands as cli
from oprd.folders.run_folder import resolved_settings, write_resolved
from oprd.foundation.errors import UserError
from oprd.foundation.meters import MB
from oprd.models.loading import load_model, load_tokenizer, resolve_model
from oprd.preflight import doctor
from oprd.preflight.checks import check_disk
from oprd.preflight.doctor import examine, longest_rollout
from oprd.preflight.planning import knobs, machine
from oprd.preflight.planning.footprint import STUDENT, TEACHER
from oprd.preflight.planning.knobs import first_knob
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.memory_plan import plan_memory
from oprd.rollouts.engines.vllm import is_installed
from oprd.training.rollout_trainer import RolloutTrainer
from oprd.training.train import parse_training_recipe, prompts_of, run_inputs

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


@pytest.fixture
def far(tmp_path_factory):
    """Keys of the tiny pair with positions for rollouts that need gigabytes."""
    keys = {}
    for key, name in (("model_name_or_path", "student"), ("teacher_model_name_or_path", "teacher")):
        folder = tmp_path_factory.mktemp("far") / name
        shutil.copytree(resolve_model(f"tiny:{name}"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
        keys[key] = str(folder)
    return keys


def test_a_run_that_fits(capsys, recipe, tmp_path):
    assert cli.run(["doctor", recipe()]) == 0
    out = capsys.readouterr().out
    assert "tiny:student learns from tiny:teacher" in out and "it fits" in out
    for part in ("student's weights", "optimiser's state", "activations and losses", "sum"):
        assert part in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "recipe.yaml"]


def test_gpus_that_are_not_here(capsys, recipe):
    """This machine's engine, folder and disk are of no concern."""
    assert cli.run(["doctor", recipe(), "--gpu", "80GB", "--ranks", "8", "--use_vllm", "true"]) == 0
    out = capsys.readouterr().out
    assert "such a GPU has 80,000 MB: it fits" in out and "24,000.0" in out and "engine" not in out
    assert cli.run(["doctor", recipe(), "--gpu", "large"]) == 2
    assert "'large' is no size of memory: write it as 80GB or 24GiB" in capsys.readouterr().err


@pytest.mark.drill
def test_a_gpu_that_is_not_here_and_too_small(capsys, recipe):
    assert cli.run(["doctor", recipe(), "--gpu", "0.6GB"]) == 2
    assert "such a GPU has 600 MB: it does not fit" in capsys.readouterr().err


def test_findings_are_told_as_they_are_made_and_nothing_is_turned_where_there_is_room(recipe, monkeypatch):
    told = []

    def refuse(*_):
        raise AssertionError("a knob was planned")

    def plan(*arguments):
        told.append("the plan")
        return plan_memory(*arguments)

    monkeypatch.setattr(doctor, "first_knob", refuse)
    monkeypatch.setattr(doctor, "plan_memory", plan)
    run, config = parse_training_recipe(recipe())
    diagnosis = examine(run, config, tell=lambda finding: told.append(finding.about))
    assert told == ["recipe", "prompts", "rollouts", "engine", "folder", "the plan", "disk", "memory"]
    assert diagnosis.knob is None and diagnosis.is_well


@pytest.fixture
def container(monkeypatch, tmp_path):
    """`container(limit)`: this process is in one that may take so many bytes, and has taken none."""

    def make(limit):
        monkeypatch.setattr(machine, "CONTAINER", tmp_path)
        for name, text in (("max", f"{limit}"), ("current", "0"), ("stat", "inactive_file 0")):
            (tmp_path / f"memory.{name}").write_text(text)

    return make


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a container may take")
def test_a_run_that_does_not_fit(capsys, recipe, container, far):
    path = recipe(per_device_train_batch_size=64, max_completion_length=1000, **far)  # 5.3 GB, then 2.2
    container(4_000_000_000)
    assert cli.run(["doctor", path, "--json"]) == 2
    out, error = capsys.readouterr()
    last = error.strip().splitlines()[-1]
    assert "does not fit; first turn" in last and "saves" in last and "Traceback" not in error
    found = json.loads(out)
    assert found["is_well"] is False and found["peak_mb"] > found["free_mb"]
    assert found["first_knob"]["keys"] == "gradient_checkpointing: true"
    assert found["first_knob"]["peak_mb"] <= found["free_mb"]
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


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num_generations", "3"], "num_generations=3 does not divide"),
        (["--per_device_train_batch_size", "4096"], "a step takes 8192 prompts, and the dataset has 4200"),
        (["--output_dir", "{model}"], "holds model.safetensors, which is not of this command"),
        (["--use_vllm", "true"], "there is no vLLM"),
        (["--temperature", "0"], "temperature must be above 0 and finite, got 0.0"),
        (
            ["--max_steps", "1000000000", "--save_steps", "1", "--save_total_limit", "0"],
            "set save_total_limit",
        ),
        (
            ["--model_name_or_path", "{experts}", "--teacher_model_name_or_path", "{experts}"],
            "cannot be planned",
        ),
    ],
    ids=str,
)
def test_what_a_run_would_stumble_over(capsys, recipe, tmp_path, experts, flags, says):
    if "--use_vllm" in flags and is_installed():
        pytest.skip("vLLM is installed")
    named = {"model": resolve_model("tiny:student"), "experts": experts}
    assert cli.run(["doctor", recipe(), *(flag.format(**named) for flag in flags)]) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_folder_that_holds_a_run(capsys, recipe, tmp_path):
    run, config = parse_training_recipe(recipe())
    settings = resolved_settings(config, run) | {"num_processes": 1}
    write_resolved(tmp_path / "run", settings, run_inputs(run, config, prompts_of(run, config)))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert cli.run(["doctor", recipe()]) == 0
    assert "holds this run, which would resume" in capsys.readouterr().out
    assert cli.run(["doctor", recipe(), "--learning_rate", "0.5"]) == 2
    assert "holds a run with learning_rate" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def experts(tiny_model, tmp_path):
    """A folder with a mixture of experts, which computes on a CPU, but not on shapes alone."""
    folder = tmp_path / "experts"
    tiny_model("qwen3_moe", vocab_size=289).save_pretrained(folder)
    load_tokenizer("tiny:student").save_pretrained(folder)
    return str(folder)


def test_what_cannot_be_planned_can_be_tried(capsys, recipe, experts):
    path = recipe(model_name_or_path=experts, teacher_model_name_or_path=experts)
    assert cli.run(["train", path, "--dry_run"]) == 0
    assert "2 steps of" in (out := capsys.readouterr().out) and "(not planned)" in out


def test_a_dry_run_through_a_bridge(capsys, recipe, tmp_path):
    fit = ["recipes/tiny/bridge.yaml", "--num_prompts", "32", "--rank", "4"]
    assert cli.run(["bridge", *fit, "--output_dir", str(tmp_path / "bridge")]) == 0
    keys = {"teacher_model_name_or_path": "tiny:bridge-teacher", "bridge": str(tmp_path / "bridge")}
    path = recipe(**keys, anchor_weight=1, positions="all")
    assert cli.run(["train", path, "--dry_run"]) == 0
    assert "2 steps of" in capsys.readouterr().out
    assert cli.run(["doctor", path, "--teacher_model_name_or_path", "tiny:teacher"]) == 2
    assert "it belongs to another pair" in capsys.readouterr().err.strip().splitlines()[-1]


def test_ranks_share_a_sharded_run(recipe):
    run, config = parse_training_recipe(recipe(), ["--fsdp", "true"])
    alone, shared = (examine(run, config, ranks=ranks) for ranks in (1, 4))
    assert shared.machine.ranks == 4 and shared.machine.sharded
    for part in (STUDENT, TEACHER):
        assert shared.plan.update[part] < 0.3 * alone.plan.update[part]


@pytest.mark.parametrize(
    ("changes", "room", "keys"),
    [
        ({}, 0.95, "gradient_checkpointing: true"),
        pytest.param(
            {"gradient_checkpointing": True, "output_loss": "full_vocab"},
            0.9,
            "per_device_train_batch_size: 2, gradient_accumulation_steps: 4",
            marks=pytest.mark.drill,
        ),
        pytest.param(
            {"gradient_checkpointing": True, "per_device_train_batch_size": 1},
            0.8,
            "max_completion_length: 200",
            marks=pytest.mark.drill,
        ),
        pytest.param(
            {"max_tokens_per_micro_batch": 2000, "gradient_checkpointing": True},
            0.8,
            "max_tokens_per_micro_batch: 1000",
            marks=pytest.mark.drill,
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


def test_lengths_beyond_the_positions_are_refused_as_by_the_run(capsys, recipe):
    """Of tiny's 512 positions the longest prompt takes 8; another tokenizer's responses are not known yet."""
    path = recipe()
    assert cli.run(["doctor", path, "--max_completion_length", "505"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "max_completion_length is 505, but the student has 512 positions" in line
    assert "lower it to 504" in line
    run, config = parse_training_recipe(path, ["--max_completion_length", "16384"])
    longest, _ = longest_rollout(run, config)
    assert (len(longest.prompt_ids), longest.num_tokens) == (8, 512)


def test_attention_that_is_kept_is_what_costs_least_to_turn(recipe):
    run, config = parse_training_recipe(recipe(gradient_checkpointing=True, keep_attention=True))
    turns = knobs._turns(config, longest_rollout(run, config)[0], Machine(torch.device("cpu"), 0, 0))
    keys, turned, _ = next(turns)
    assert keys == "keep_attention: false" and not turned.keep_attention


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


def test_rollouts_without_an_end_are_supervised_in_a_dry_run(recipe, monkeypatch):
    supervised = []
    describe = RolloutTrainer._describe

    def note(self, batch, aligned):
        supervised.append((batch["representation_weights"] > 0).sum().item())
        describe(self, batch, aligned)

    monkeypatch.setattr(RolloutTrainer, "_describe", note)
    path = recipe(mask_truncated_completions=True, positions="all")
    assert cli.run(["train", path, "--dry_run"]) == 0
    assert supervised == [8 * 16] * 2


def test_adapters_end_as_a_whole_model_on_the_disk(recipe, monkeypatch):
    run, config = parse_training_recipe(recipe(use_peft=True, save_strategy="no"))
    longest, _ = longest_rollout(run, config)
    plan = plan_memory(run.model_name_or_path, config, longest, Machine(torch.device("cpu"), 0, 0), run.lora)
    whole = sum(weight.numel() for weight in load_model("tiny:student").parameters())
    assert plan.final_bytes - plan.model_bytes == 4 * whole
    disk = SimpleNamespace(free=plan.final_bytes)
    monkeypatch.setattr("shutil.disk_usage", lambda _: disk)
    assert "and the model" in check_disk(Path(config.output_dir), config, plan)
    disk.free -= 1
    with pytest.raises(UserError, match="do not fit"):
        check_disk(Path(config.output_dir), config, plan)


@pytest.mark.skipif(is_bitsandbytes_available(), reason="bitsandbytes is installed")
@pytest.mark.parametrize("command", [["doctor"], ["train"], ["train", "--dry_run"]], ids=" ".join)
def test_an_optimiser_that_is_not_installed(capsys, recipe, tmp_path, command):
    path = recipe(optim="adamw_bnb_8bit")
    assert cli.run([command[0], path, *command[1:]]) == 2
    assert "bitsandbytes" in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="reads what a container may take")
def test_what_cannot_fit_is_not_tried(capsys, recipe, container, far):
    container(100_000_000)
    few_knobs = {"gradient_checkpointing": True, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    path = recipe(per_device_train_batch_size=63, max_completion_length=1000, **few_knobs, **far)
    assert cli.run(["train", path, "--dry_run"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "out of memory at the longest rollout" in last and "first turn" in last


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.parametrize("megabytes", [2000, 800])  # in the first update, and before the models are there
def test_running_out_of_memory_names_the_first_knob(recipe, megabytes, far):
    path = recipe(per_device_train_batch_size=32, max_completion_length=2048, **far)
    room = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({megabytes}_000_000,) * 2)"
    script = f"{room}; import sys; from oprd import cli; cli.main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "train", path, "--dry_run"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert "out of memory at the longest rollout" in last
    assert "first turn gradient_checkpointing: true" in last


def test_no_room_for_a_plan_of_a_knob(capsys, recipe, monkeypatch, container, far):
    """What is left to say where planning runs out of memory, too."""

    def fill(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    container(100_000_000)
    monkeypatch.setattr(knobs, "plan_memory", fill)
    path = recipe(per_device_train_batch_size=64, max_completion_length=1000, **far)
    assert cli.run(["train", path, "--dry_run"]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "first turn gradient_checkpointing: true, then halve the micro-batch" in last


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
