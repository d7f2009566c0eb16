"""Writes one line of `metrics.jsonl` per optimiser step and keeps a progress bar with the same numbers."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oprd.folder.whole import write_whole
from oprd.meters import Averages, MemoryMeter, Stopwatch

METRICS_FILE = "metrics.jsonl"
BAR = {
    "loss": "loss/total",
    "cos": "representation/cosine",
    "len": "rollout/mean_length",
    "cut": "rollout/truncated_share",
}


class Recorder(TrainerCallback):
    """Collects what a step measured, hands it to the trackers and appends it to `metrics.jsonl`.

    `reduce` sums a tensor over ranks; `publish` passes a step's numbers on to the trainer's log.
    `observers` may add numbers of their own, given the step that has just ended, from 1, and its numbers;
    `resumers` are given the lines of the steps that a resumed run has behind it.
    """

    def __init__(
        self,
        averages: Averages,
        stopwatch: Stopwatch,
        memory: MemoryMeter,
        reduce: Callable[[Tensor], Tensor],
        publish: Callable[[dict[str, float]], None],
    ) -> None:
        self.averages, self.stopwatch, self.memory = averages, stopwatch, memory
        self.grad_norm = 0.0
        self.label = "distil"
        self.observers: list[Callable[[int, dict[str, float]], dict[str, float]]] = []
        self.resumers: list[Callable[[list[dict[str, float]]], None]] = []
        self._reduce, self._publish = reduce, publish
        self._learning_rate = 0.0
        self._bar: tqdm | None = None
        self._optimizer_part: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        past = read_metrics(Path(args.output_dir) / METRICS_FILE) if state.global_step else []
        for take_up in self.resumers:
            take_up([record for record in past if record["step"] <= state.global_step])
        if not state.is_world_process_zero:
            return
        keep_steps(Path(args.output_dir) / METRICS_FILE, state.global_step)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            disable=args.disable_tqdm,
            dynamic_ncols=True,
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        self._optimizer_part = self.stopwatch.part("optimizer")
        self._optimizer_part.__enter__()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._optimizer_part.__exit__(None, None, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        values = self.averages.pop(self._reduce)
        values |= {"grad_norm": self.grad_norm} if math.isfinite(self.grad_norm) else {}
        values["learning_rate"] = self._learning_rate
        values |= {f"time/{name}_seconds": seconds for name, seconds in self.stopwatch.pop().items()}
        values |= self.memory.read()
        for observe in self.observers:
            values |= observe(state.global_step, values)
        self._publish(values)
        if state.is_world_process_zero:
            with (Path(args.output_dir) / METRICS_FILE).open("a") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint of this step, which relies on it
        if self._bar is not None:
            self._bar.set_postfix(
                {short: f"{values[name]:.3g}" for short, name in BAR.items() if name in values}, refresh=False
            )
            self._bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def keep_steps(path: Path, last_step: int) -> None:
    """Drop the lines of `metrics.jsonl` after `last_step`, and half-written ones: none will stand twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The whole lines of a `metrics.jsonl`, in order; empty where there is none."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
