"""Runs of the command line that may be killed, and what has to be equal when one was."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from oprd.folders.claims import is_finished
from oprd.folders.recorder import read_metrics
from places import ROOT

CLI = [sys.executable, "-m", "oprd.cli"]
DRIVER = [sys.executable, str(Path(__file__).with_name("kill_driver.py"))]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# Four rollouts of two prompts a step, in two micro-batches; 8 prompts: an epoch has 4 steps.
SMALL = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_generations": 2,
    "max_completion_length": 12,
    "max_steps": 6,
    "save_steps": 2,
    "disable_tqdm": True,
}


def prompts(path: Path, count: int = 8) -> Path:
    """A file of problems in the words of the bundled task."""
    texts = [f"What is {11 * i + 3} + {i} + 5 + {90 - i}?" for i in range(count)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(folder: Path, data: Path, **changes: Any) -> list[str]:
    """The flags of a small run."""
    settings = SMALL | {"dataset_name": data, "output_dir": folder} | changes
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def start(command: list[str], argv: list[str], largest_file: int | None = None) -> subprocess.Popen[str]:
    """Start a command in the repository, its output kept, no file of it larger than so many bytes.

    It hears Ctrl-C, which background jobs do not.
    """

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [*command, *argv],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def run(command: list[str], argv: list[str], **options: Any) -> tuple[int, str]:
    """Run a command to its end; returns the exit code and what it said on stderr."""
    process = start(command, argv, **options)
    try:
        _, said = process.communicate(timeout=300)
    finally:
        process.kill()
    return process.returncode, said


def finish(argv: list[str], folder: Path, command: list[str] = CLI) -> str:
    """Run `oprd train` until `folder` is finished; returns what it said on stderr."""
    code, said = run(command, argv)
    assert code == 0, said[-3000:]
    assert is_finished(folder, 1)
    return said


def kill_at(moment: str, call: int, argv: list[str]) -> None:
    """Run until the `call`-th matching call, which is killed."""
    code, said = run([*DRIVER, moment, str(call)], argv)
    assert code == -signal.SIGKILL, (code, said[-3000:])


def lasting(folder: Path) -> list[dict[str, float]]:
    """The metrics that a resumed run repeats to the last bit."""
    return [
        {k: v for k, v in record.items() if not k.startswith(("time/", "memory/"))}
        for record in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same_run(one: Path, other: Path, last_step: int) -> None:
    """Equal metrics, final weights, and optimiser, schedule and random state at the last step."""
    assert [record["step"] for record in lasting(one)] == list(range(1, last_step + 1))
    assert lasting(one) == lasting(other)
    for path in (*one.glob("*model.safetensors"), *one.glob("merged/*.safetensors")):
        assert_same(load_file(path), load_file(other / path.relative_to(one)))
    left, right = (folder / f"checkpoint-{last_step}" for folder in (one, other))
    states = {path.name for path in left.iterdir() if path.suffix in (".pt", ".pth")}
    assert states >= {"optimizer.pt", "scheduler.pt"} and any(name.startswith("rng_state") for name in states)
    for name in states:
        assert_same(*(torch.load(folder / name, weights_only=False) for folder in (left, right)), name)


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equal to the last bit, through dictionaries and lists."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert bool((one == other) if not hasattr(one, "shape") else (one == other).all()), where
