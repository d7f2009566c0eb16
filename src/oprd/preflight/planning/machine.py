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
from oprd.foundation.ranks import Ranks

CONTAINER = Path("/sys/fs/cgroup")
CONTEXT_BYTES = 600_000_000  # CUDA's context and its libraries' workspaces, roughly: not measured by us


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

        `ranks` overrides the number of processes. On a CPU the ranks share the free memory, and what this
        process holds now stands for what each holds besides tensors: later it is more. Ranks launched there
        are not sharded by accelerate, those that `ranks` imagines are.
        """
        world, sharded = ranks or Ranks.launched().count, _asks_for_fsdp(settings)
        if not settings.use_cpu and torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return cls(torch.device("cuda"), total, free, ranks=world, sharded=sharded, is_gpu=True)
        here = int(resident_mb("VmRSS") * MB) if Path("/proc/self/status").exists() else 0
        memory, local = psutil.virtual_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = int(min(memory.available, _container_memory())) // local + here
        return cls(torch.device("cpu"), memory.total, free, here, world, sharded and ranks is not None)

    @classmethod
    def with_gpus(cls, size: int, settings: Any, ranks: int | None = None) -> "Machine":
        """A machine that is not here, with a GPU of `size` bytes for each rank.

        Tensors without values stand on the CPU, where torch without CUDA can make them.
        """
        world = ranks or Ranks.launched().count
        sharded = world > 1 and _asks_for_fsdp(settings)
        return cls(torch.device("cpu"), size, size, CONTEXT_BYTES, world, sharded, is_gpu=True)


def parse_size(text: str) -> int:
    """Bytes of `80GB`, `80` or `24GiB`; raises `UserError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB|)", text.strip(), re.I)
    if found is None or not float(found[1]):
        raise UserError(f"{text!r} is no size of memory: write it as 80GB or 24GiB")
    return int(float(found[1]) * (2**30 if found[2].lower() == "gib" else 10**9))


def _asks_for_fsdp(settings: Any) -> bool:
    return bool(settings.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")


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
