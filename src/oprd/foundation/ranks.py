"""The processes that torchrun or accelerate launch started: which one this is, and how many there are."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """One process of `count`, and which one it is of its machine's.

    For what runs before, or without, a trainer: its `args` and `accelerator` know the same.
    """

    index: int
    count: int
    local: int = 0

    @classmethod
    def launched(cls) -> "Ranks":
        """What the launcher's variables say; the only process where there is none."""
        names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        return cls(*(int(os.environ.get(name, alone)) for name, alone in names.items()))

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports for all."""
        return self.index == 0

    @property
    def device(self) -> torch.device:
        """The accelerator of this process, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in order."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes of the launcher for the length of the block, or stay alone where there is none."""
    ranks = Ranks.launched()
    if ranks.count == 1:
        yield ranks
        return
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    dist.init_process_group(timeout=timedelta(days=1))  # ranks meet once, after all their rollouts
    yield ranks
    dist.barrier()
    leave_ranks()


def leave_ranks() -> None:
    """Destroy the process group with its threads, which could abort the interpreter at exit.

    They live as long as anything holds the group, and trainers hold it in reference cycles.
    """
    gc.collect()
    dist.destroy_process_group()
