"""What a rank runs on: its device, the memory there, and who shares the weights."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from oprd.foundation.errors import UserError
from oprd.foundation.meters import MB, resident_mb

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|)", re.I)
CONTAINER = Path("/sys/fs/cgroup")
CONTEXT_BYTES = 600_000_000  # CUDA's context and its libraries' workspaces, roughly: not measured by us
UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30}


@dataclass(frozen=True)
class Machine:
    """Where one rank runs, in bytes: its device, what is free there, what lies there before weights do."""

    device: torch.device
    device_bytes: int
    free_bytes: int
    process_bytes: int = 0
    ranks: int = 1
    sharded: bool = False
    is_gpu: bool = False

    @classmethod
    def here(cls, settings: Any, ranks: int | None = None) -> "Machine":
        """This machine under the launcher's environment and the keys of `settings`, an `OPRDConfig`.

        `ranks` overrides the number of processes. On a CPU the free memory is shared by the ranks of the
        machine, and what this process holds now stands for what a run's does; ranks launched there are not
        sharded by accelerate, those that `ranks` imagines are.
        """
        world = ranks or launched_ranks()
        sharded = bool(settings.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if not settings.use_cpu and torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return cls(torch.device("cuda"), total, free, ranks=world, sharded=sharded, is_gpu=True)
        sharded = sharded and ranks is not None
        here = int(resident_mb("VmRSS") * MB) if Path("/proc/self/status").exists() else 0
        memory = psutil.virtual_memory()
        free = int(min(memory.available, _container_memory()))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(torch.device("cpu"), memory.total, free // local + here, here, world, sharded)

    @classmethod
    def with_gpus(cls, size: int, settings: Any, ranks: int | None = None) -> "Machine":
        """A machine that is not here, with a GPU of `size` bytes for each rank.

        Tensors without values stand on the CPU, where torch without CUDA can make them.
        """
        sharded = bool(settings.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
        world = ranks or launched_ranks()
        return cls(torch.device("cpu"), size, size, CONTEXT_BYTES, world, sharded and world > 1, is_gpu=True)


def parse_size(text: str) -> int:
    """Bytes of `80GB`, `80` or `24GiB`; raises `UserError`."""
    found = SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UserError(f"{text!r} is no size of memory: write it as 80GB or 24GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def launched_ranks() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _container_memory() -> float:
    """Bytes that a container may still take, cached files given up; endless where nothing limits it."""
    try:
        limit, used, stat = (
            (CONTAINER / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
    except OSError:
        return math.inf
    cached = int(dict(line.split() for line in stat.splitlines())["inactive_file"])
    return math.inf if limit.strip() == "max" else int(limit) - int(used) + cached
