"""A run that gets a signal ends after its step, with a checkpoint; at a second signal it exits at once."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oprd.folders.checkpoints import checkpoints
from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.folders.whole import SEAL_FILE
from oprd.foundation.ranks import Ranks
from oprd.foundation.signals import SIGNALS, Stopped

# torchrun hands on the Ctrl-C that its processes have had from the terminal already.
LAUNCHER = "TORCHELASTIC_RUN_ID"
ECHO_SECONDS = 5


class Stopping(TrainerCallback):
    """Ends training after the step in which any rank got a signal; handles the signals of its process.

    `reduce` sums a tensor over ranks, so that all of them stop after the same step. `agreed` is then the
    number of the signal.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self.agreed: int | None = None
        self._reduce = reduce
        self._step: int | None = None
        self._number: int | None = None
        self._since = 0.0

    def handle(self, number: int) -> None:
        """Remember a first signal; raise `Stopped` for a second one, and outside a step."""
        if self._step is None:
            raise Stopped(number)
        if self._number is None:
            self._number, self._since = number, time.monotonic()
            _tell(f"{signal.Signals(number).name}: stopping after step {self._step}; again to leave at once")
        elif LAUNCHER not in os.environ or time.monotonic() - self._since > ECHO_SECONDS:
            raise Stopped(number)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._step = state.global_step + 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        told = self._reduce(torch.tensor([float(number == self._number) for number in SIGNALS]))
        if told.any():
            self.agreed = SIGNALS[int(told.argmax())]
            control.should_save = control.should_training_stop = True


def standing(folder: Path, max_steps: int) -> str:
    """What a run that was stopped has kept, and what the same command does, in words."""
    kept = next((path for path in checkpoints(folder) if (path / SEAL_FILE).exists()), None)
    if kept is None:
        steps = len(read_metrics(folder / METRICS_FILE))
        done = f"after step {steps}, without a checkpoint" if steps else "before the end of step 1"
        return f"{done} of {folder}: the same command starts over"
    step = int(kept.name.removeprefix("checkpoint-"))
    if step >= max_steps:
        return f"after the last step, with {kept}: the same command saves the model"
    return f"with {kept}: the same command goes on from step {step + 1}"


def _tell(text: str) -> None:
    """Write a line at once, even while another is being printed; one rank does."""
    if Ranks.launched().is_first:
        os.write(2, f"\noprd: {text}\n".encode())
