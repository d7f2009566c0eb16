"""Better alignment, worse behaviour: accuracy that falls beyond its interval, told and, if asked, ended.

Through depth-paired bridges a student's states can come ever closer to the teacher's while its answers get
worse (LastOPD, arXiv 2609.28845).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from oprd.evaluation.metrics import confidence_interval
from oprd.foundation.errors import Fault

logger = logging.getLogger(__name__)

ACCURACY, LOW, NO_ANSWER = "eval/avg_at_k", "eval/ci95_low", "eval/no_answer_share"
ALIGNMENT = "representation/cosine"


@dataclass(frozen=True)
class Measurement:
    """What the problems said after a step, and the mean alignment of the steps since the one before."""

    step: int
    accuracy: float
    low: float  # end of its 95 % interval
    answered: float  # share of responses that state an answer
    alignment: float | None


class CollapseWatch(TrainerCallback):
    """Compares each measurement of accuracy on `problems` problems with the best one so far.

    It warns when a measurement lies below the interval of the best, in accuracy or in the share of responses
    that state an answer. After `patience` such measurements in a row, if that is given, the run stops with a
    checkpoint, and `check` raises. Every rank has the same numbers, and comes to the same end.
    """

    def __init__(self, problems: int, patience: int | None) -> None:
        self.best: Measurement | None = None
        self._problems, self._patience = problems, patience
        self._last: Measurement | None = None
        self._below = 0
        self._alignments: list[float] = []

    def resume(self, records: Sequence[Mapping[str, float]]) -> None:
        """Count the measurements that a resumed run has behind it."""
        for record in records:
            self._count(int(record["step"]), record)

    def observe(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Warn of a fall that has just been measured."""
        if self._count(step, values):
            logger.warning("%s", self._told())
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
            raise Fault(f"stopped with a checkpoint (stop_on_collapse: {self._patience}). {self._told()}")

    @property
    def _is_over(self) -> bool:
        return self._patience is not None and self._below >= self._patience

    def _count(self, step: int, values: Mapping[str, float]) -> bool:
        """Take up a step's numbers; returns whether they are a measurement below the best one."""
        if ALIGNMENT in values:
            self._alignments.append(values[ALIGNMENT])
        if ACCURACY not in values:
            return False
        alignment = fmean(self._alignments) if self._alignments else None
        answered = 1 - values[NO_ANSWER]
        now = self._last = Measurement(step, values[ACCURACY], values[LOW], answered, alignment)
        self._alignments.clear()
        if self.best is None or now.accuracy > self.best.accuracy:
            self.best, self._below = now, 0
            return False
        is_below = bool(self._falls(now, self.best))
        self._below = self._below + 1 if is_below else 0
        return is_below

    def _falls(self, now: Measurement, best: Measurement) -> list[str]:
        """What has fallen out of the interval of the best measurement, in words."""
        falls = []
        if now.accuracy < best.low:
            falls.append(f"accuracy is {now.accuracy:.1%} and was {best.accuracy:.1%}")
        if now.answered < self._least_answered(best):
            falls.append(f"{now.answered:.0%} of responses state an answer, and {best.answered:.0%} did")
        return falls

    def _least_answered(self, best: Measurement) -> float:
        """The end of the 95 % interval of the best measurement's share of answers."""
        count = round(best.answered * self._problems)
        return confidence_interval([1.0] * count + [0.0] * (self._problems - count))[0]

    def _told(self) -> str:
        now, best = self._last, self.best
        assert now is not None and best is not None
        what = "; ".join(self._falls(now, best))
        return f"step {now.step}: {what} at step {best.step}. {_cause(now, best)}"


def _cause(now: Measurement, best: Measurement) -> str:
    if now.alignment is None or best.alignment is None:
        return "Lower learning_rate, or stop earlier"
    cosines = f"the states' cosine went from {best.alignment:.3f} to {now.alignment:.3f}"
    if now.alignment > best.alignment:
        return (
            f"Better alignment, worse behaviour ({cosines}): compare the last layer alone (layers: last), or "
            "let representation_weight go to 0 in favour of an output loss"
        )
    return f"Alignment fell too ({cosines}): lower learning_rate"
