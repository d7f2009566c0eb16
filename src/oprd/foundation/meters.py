"""What a run measures besides its loss: sums over micro-batches and ranks, seconds and memory."""

import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MB = 1e6


class Averages:
    """Sums and weighted means over micro-batches, kept on the device until they are read."""

    def __init__(self) -> None:
        self._entries: dict[str, Tensor] = {}
        self._plain: set[str] = set()

    def add(self, name: str, total: Tensor | float, weight: Tensor | float | None = None) -> None:
        """Add `total`, a sum over `weight` units, to a mean; without a weight, to a plain sum."""
        if weight is None:
            self._plain.add(name)
        device = total.device if isinstance(total, Tensor) else None
        pair = (total, 1.0 if weight is None else weight)
        entry = torch.stack([torch.as_tensor(x, device=device).detach().float() for x in pair])
        self._entries[name] = self._entries[name] + entry if name in self._entries else entry

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Values by name after `reduce` summed the entries over ranks; empties the meter.

        A mean over no units has nothing to say and is left out.
        """
        if not self._entries:
            return {}
        names = list(self._entries)
        entries = reduce(torch.stack([entry.cpu() for entry in self._entries.values()]))
        self._entries = {}
        return {
            name: total if name in self._plain else total / weight
            for name, (total, weight) in zip(names, entries.tolist(), strict=True)
            if weight > 0
        }


class Stopwatch:
    """Seconds spent in named parts; parts may be nested, and each counts its own time only.

    On CUDA the device's own clock is read, once, by `pop`: nothing waits for the device while it works.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._laps: list[tuple[str, Any, Any]] = []
        self._open: list[str] = []
        self._since: Any = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block under `name`, and not under the part around it."""
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def pop(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        laps, self._laps = self._laps, []
        if self._on_cuda:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for name, start, end in laps:
            seconds[name] += start.elapsed_time(end) / 1000 if self._on_cuda else end - start
        return dict(seconds)

    def _lap(self) -> None:
        now = self._mark()
        if self._open:
            self._laps.append((self._open[-1], self._since, now))
        self._since = now

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class MemoryMeter:
    """Peak memory of a step's rollouts and of its update, and how far the update rose above its start.

    CUDA: the allocator's peak. Linux without CUDA: the peak resident set, after freed memory has been
    handed back to the system. Elsewhere nothing is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline: float | None = None
        self._rollout: dict[str, float] = {}

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """Measure the block as the rollouts of the step that `read` will report."""
        self.start()
        yield
        if self._baseline is not None:
            self._rollout = {"memory/rollout_peak_mb": self._peak()}

    def start(self) -> None:
        """Mark the baseline and forget earlier peaks."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._baseline = torch.cuda.memory_allocated(self._device) / MB
        elif sys.platform == "linux":
            with suppress(OSError, AttributeError):  # a sandbox without /proc, a C library without trimming
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
                self._baseline = resident_mb("VmRSS")

    def read(self) -> dict[str, float]:
        """`memory/peak_mb` and `memory/transient_mb` since `start`, and `memory/rollout_peak_mb` if measured.

        Empty where nothing is measured.
        """
        if self._baseline is None:
            return {}
        rollout, self._rollout = self._rollout, {}
        peak = self._peak()
        return {
            "memory/peak_mb": peak,
            "memory/transient_mb": max(peak - self._baseline, 0.0),
            **rollout,
        }

    def _peak(self) -> float:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / MB
        return resident_mb("VmHWM")


def resident_mb(field: str) -> float:
    """A field of this process's /proc status, such as VmRSS, in 10⁶ bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError(f"/proc/self/status has no {field}")
