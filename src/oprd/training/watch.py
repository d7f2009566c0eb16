"""What watches a run's numbers for a student that gets worse: warnings and, if asked, an end."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oprd.foundation.errors import Fault

logger = logging.getLogger(__name__)


class Watch(TrainerCallback):
    """Judges the numbers of steps and warns of what is wrong.

    After `patience` judgements in a row of something wrong, if that is given, the run stops with a
    checkpoint, and `check` raises. Every rank has the same numbers, and comes to the same end.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._wrong: list[str] = []  # judgements in a row

    def judge(self, step: int, values: Mapping[str, float]) -> str | None:
        """What is wrong after a step, "" if nothing is, None where there is nothing to judge by."""
        raise NotImplementedError

    def resume(self, records: Sequence[Mapping[str, float]]) -> None:
        """Judge the steps that a resumed run has behind it."""
        for record in records:
            self._count(int(record["step"]), record)

    def observe(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Warn of what has just gone wrong."""
        if told := self._count(step, values):
            logger.warning("step %d: %s", step, told)
        return {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take no step of a run that is resumed with its patience over."""
        if state.global_step < state.max_steps:
            self.check()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop once patience is over."""
        if self._is_over:
            control.should_save = control.should_training_stop = True

    def check(self) -> None:
        """Raise `Fault` once patience is over."""
        if self._is_over:
            raise Fault(f"stopped with a checkpoint (stop_on_collapse: {self._patience}). {self._wrong[-1]}")

    @property
    def _is_over(self) -> bool:
        return self._patience is not None and len(self._wrong) >= self._patience

    def _count(self, step: int, values: Mapping[str, float]) -> str | None:
        told = self.judge(step, values)
        if told is not None:
            self._wrong = [*self._wrong, f"step {step}: {told}"] if told else []
        return told
