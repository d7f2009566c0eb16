"""Writes one line of `metrics.jsonl` per optimiser step and keeps a progress bar with the same numbers."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oprd.folders.lock import check_held
from oprd.folders.run_folder import output_folder
from oprd.folders.whole import write_whole
from oprd.foundation.errors import UserError, writing
from oprd.foundation.meters import Averages, MemoryMeter, Stopwatch

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
BAR = {
    "loss": "loss/total",
    "acc": "eval/avg_at_k",
    "cos": "representation/cosine",
    "len": "rollout/mean_length",
    "cut": "rollout/truncated_share",
}


class Recorder(TrainerCallback):
    """Collects what a step measured, hands it to the trackers and appends it to `metrics.jsonl`.

    `reduce` sums a tensor over ranks; `publish` passes a step's numbers on to the trainer's log; `begin` is
    called on the first rank before the first step.
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
        begin: Callable[[TrainerState], None],
    ) -> None:
        self.averages, self.stopwatch, self.memory = averages, stopwatch, memory
        self.grad_norm = 0.0
        self.label = "distil"
        self.observers: list[Callable[[int, dict[str, float]], dict[str, float]]] = []
        self.resumers: list[Callable[[list[dict[str, float]]], None]] = []
        self.bar: tqdm | None = None
        self._reduce, self._publish, self._begin = reduce, publish, begin
        self._learning_rate = 0.0
        self._accuracy: dict[str, float] = {}
        self._optimizer_part: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        past = read_metrics(output_folder(args) / METRICS_FILE) if state.global_step else []
        for take_up in self.resumers:
            take_up([record for record in past if record["step"] <= state.global_step])
        if not state.is_world_process_zero:
            return
        keep_steps(output_folder(args) / METRICS_FILE, state.global_step)
        self._begin(state)
        self.bar = tqdm(
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
            check_held(output_folder(args))
            path = output_folder(args) / METRICS_FILE
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint of this step, which relies on it
        if self.bar is not None:
            self._accuracy |= {name: values[name] for name in (BAR["acc"],) if name in values}
            shown = self._accuracy | values
            self.bar.set_postfix(
                {short: f"{shown[name]:.3g}" for short, name in BAR.items() if name in shown}, refresh=False
            )
            self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()


def keep_steps(path: Path, last_step: int) -> None:
    """Drop the lines of `metrics.jsonl` after `last_step`, and a half-written one: none will stand twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    if len(kept) < last_step:
        logger.warning("%s lacks %d of the %d steps behind this run", path, last_step - len(kept), last_step)
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, in order; none where there is no file.

    A last line that a killed process has half written is left out, and so are blank ones. Raises `UserError`
    for any other line that is not of a step and its numbers, or of a step that is not after those before it.
    """
    records: list[dict[str, float]] = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines, last = text.split("\n"), 0
    for number, line in enumerate(lines, 1):
        if not line.strip(" \r"):
            continue
        try:
            record = json.loads(line)
            follows = type(record["step"]) is int and record["step"] > last
            follows &= all(isinstance(value, int | float) for value in record.values())
        except (ValueError, LookupError, TypeError, RecursionError):
            follows = False
        if follows:
            records.append(record)
            last = record["step"]
        elif number < len(lines):  # the last one has no line's end
            raise UserError(
                f"{path}, line {number} is not of a step after those before it: fix or delete that line"
            )
    return records
