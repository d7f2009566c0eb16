"""Arms in processes of their own, run in turn; medians, and ratios of what ran in the same round.

A worker is the benchmark's own script, started with `--worker ARM`. It prints one line when it is ready and,
for every line that it reads, runs once and prints what it measured as JSON.
"""

import csv
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from oprd.foundation.meters import MB

Row = dict[str, Any]


def serve(measure: Callable[[], dict[str, float]]) -> None:
    """The worker's side: report that it is ready, then measure on request."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not reach the other side
    print("ready", file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=out, flush=True)


class Worker:
    """One arm's process."""

    def __init__(self, script: str, arm: str, arguments: Sequence[str]) -> None:
        self.arm = arm
        command = [sys.executable, script, "--worker", arm, *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._read()

    def run(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"arm {self.arm} ended (exit {self._process.wait()})")
        return line


def run_in_turn(
    script: str, arms: Sequence[str], arguments: Sequence[str], repeats: int, warm_up: bool = True
) -> list[Row]:
    """Every arm once to `warm_up`, then `repeats` rounds of all arms, each round beginning with another."""
    workers = [Worker(script, arm, arguments) for arm in arms]
    rows = []
    try:
        for worker in workers if warm_up else []:
            worker.run()
        for repeat in range(repeats):
            start = repeat % len(workers)
            for worker in workers[start:] + workers[:start]:
                rows.append({"arm": worker.arm, "repeat": repeat} | worker.run())
                print(f"round {repeat + 1}/{repeats} {worker.arm}: {rows[-1]}", file=sys.stderr, flush=True)
    finally:
        for worker in workers:
            worker.close()
    return sorted(rows, key=lambda row: (arms.index(row["arm"]), row["repeat"]))


def watched_memory() -> profile:
    """A profiler of torch's memory, for `peak_mb`; what is garbage by now is not freed while it watches."""
    gc.collect()
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def peak_mb(watched: profile) -> float:
    """The most of torch's memory on a CPU that was held at once within `watched`, in 10⁶ bytes."""
    assert watched.profiler is not None and watched.profiler.kineto_results is not None
    found = (event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]")
    sizes = (event.nbytes() for event in sorted(found, key=lambda event: event.start_ns()))
    return max(accumulate(sizes, initial=0)) / MB


def of_arm(rows: Iterable[Row], arm: str, key: str) -> list[float]:
    """An arm's measurements by round."""
    return [float(row[key]) for row in rows if row["arm"] == arm and key in row]


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios within rounds, and its 95 % bootstrap interval."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(10_000))
    return statistics.median(ratios), medians[249], medians[9749]


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        names = (
            [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
        )
        name = names[0].split(":")[1].strip() if names else platform.processor()
        name = f"{name}, {len(os.sched_getaffinity(0))} cores"
    return {"hardware": name, "torch": torch.__version__}


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
