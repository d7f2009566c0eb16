"""`oprd train --accelerate_config` starts accelerate's launcher itself."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from oprd.cli.commands import run
from oprd.cli.launch import config_file
from places import TINY_RECIPES

VANILLA = TINY_RECIPES / "vanilla.yaml"
OURS = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def train(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "oprd.cli", "train", *map(str, words)]
    return subprocess.run(command, env=OURS | environment, capture_output=True, text=True, check=False)


@pytest.mark.drill
def test_two_processes_of_a_file(tmp_path):
    launcher = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "MULTI_GPU",  # torchrun, as for GPUs
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 2,
    }
    (tmp_path / "cpu.yaml").write_text(yaml.safe_dump(launcher))
    flags = ["--max_steps", 1, "--max_completion_length", 8, "--output_dir", tmp_path / "run"]
    done = train(VANILLA, *flags, "--accelerate_config", tmp_path / "cpu.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    resolved = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    assert resolved["settings"]["num_processes"] == 2
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("name", "kind", "count"), [("fsdp2", "FSDP", 8), ("zero2", "DEEPSPEED", 8), ("one_gpu", "NO", 8)]
)
def test_names_are_those_of_trl(name, kind, count):
    config = yaml.safe_load(config_file(name).read_text())
    assert (config["distributed_type"], config["num_processes"]) == (kind, count)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--accelerate_config", "fsdp9"], "fsdp9 is neither a file nor one of fsdp1, fsdp2"),
        (["--num_processes", "2"], "--num_processes goes with --accelerate_config"),
        (["--accelerate_config", "fsdp2", "--learning_rate", "-1"], "learning_rate"),
    ],
)
def test_mistakes_are_told_before_a_launcher_starts(flags, says, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert run(["train", str(VANILLA), "--output_dir", str(tmp_path / "run"), *flags]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_launcher_within_a_launcher_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run(["train", str(VANILLA), "--accelerate_config", "fsdp2"]) == 2
    assert "--accelerate_config starts a launcher" in capsys.readouterr().err
