"""`oprd ARGV…`, ended by SIGKILL at a chosen call: `kill_driver.py MOMENT CALL ARGV…`.

The product is the real one. A writer of files has written half of the file when it dies, the deletion of a
folder has deleted half of it. With RANK set, only rank 1 dies.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationMixin, TrainerState, modeling_utils

from oprd.cli import commands as cli
from oprd.evaluation import evaluate as evaluation

Strike = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], None]


def before(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Nothing of the call is done."""


def after(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function(*args, **kwargs)


def half_written(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    function(*args, **kwargs)
    path = next(arg for arg in paths(args) if arg.is_file())
    os.truncate(path, path.stat().st_size // 2)


def half_of_the_source(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    os.truncate(args[0], args[0].stat().st_size // 2)


def half_a_line(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    os.ftruncate(args[0], os.fstat(args[0]).st_size - 40)


def half_deleted(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for path in sorted(args[0].iterdir())[::2]:
        path.unlink()


def paths(args: tuple[Any, ...]) -> list[Path]:
    """The arguments that are paths, or descriptors of files."""
    found = [Path(arg) for arg in args if isinstance(arg, str | Path)]
    return found + [Path(os.readlink(f"/proc/self/fd/{arg}")) for arg in args if isinstance(arg, int)]


# Moment: whose call, which, a part of the path in its arguments, and what has happened when it dies.
MOMENTS: dict[str, tuple[Any, str, str, Strike]] = {
    "rollout": (GenerationMixin, "prepare_inputs_for_generation", "", before),
    "update": (torch.optim.AdamW, "step", "", after),
    "evaluation": (evaluation, "grade", "", after),
    "weights": (modeling_utils, "safe_save_file", "checkpoint-", half_written),
    "save": (torch, "save", "optimizer.pt", half_written),
    "rng": (torch, "save", "rng_state", half_written),
    "state": (TrainerState, "save_to_json", "checkpoint-", half_written),
    "seal": (Path, "replace", "checkpoint-", half_of_the_source),
    "rotation": (shutil, "rmtree", "checkpoint-", half_deleted),
    "metrics": (os, "fsync", "metrics.jsonl", half_a_line),
    "metrics cut back": (Path, "replace", "metrics.jsonl", half_of_the_source),
    "resolved": (Path, "replace", "resolved.yaml", half_of_the_source),
    "final weights": (modeling_utils, "safe_save_file", "final.partial", half_written),
    "final state": (TrainerState, "save_to_json", "final.partial", half_written),
    "final move": (Path, "replace", "final.partial", before),
    "final seal": (Path, "replace", "seal.json", half_of_the_source),
    "samples": (os, "fsync", "samples.jsonl", half_a_line),
    "bridge": (Path, "write_bytes", "bridge.safetensors", half_written),
}


def arm(moment: str, call: int) -> None:
    """Let the `call`-th matching call be the last one."""
    owner, name, part, strike = MOMENTS[moment]
    function = getattr(owner, name)
    calls = 0

    @wraps(function)
    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        is_write = not part or any(part in str(path) for path in paths(args))
        is_deletion = strike is half_deleted and not (is_write and args[0].exists())
        calls += is_write and not is_deletion
        if calls == call:
            strike(function, args, kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    if os.getenv("RANK", "1") == "1":
        arm(sys.argv[1], int(sys.argv[2]))
    cli.main(sys.argv[3:])
