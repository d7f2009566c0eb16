"""Better alignment, worse behaviour: accuracy that falls beyond its interval.

Through depth-paired bridges a student's states can come ever closer to the teacher's while its answers get
worse (LastOPD, arXiv 2609.28845).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from oprd.evaluation.metrics import confidence_interval
from oprd.training.watch import Watch

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


class CollapseWatch(Watch):
    """Compares each measurement of accuracy on `problems` problems with the best one so far.

    Something is wrong when it lies below the interval of the best, in accuracy or in the share of responses
    that state an answer.
    """

    def __init__(self, problems: int, patience: int | None) -> None:
        super().__init__(patience)
        self.best: Measurement | None = None
        self._problems = problems
        self._alignments: list[float] = []

    def judge(self, step: int, values: Mapping[str, float]) -> str | None:
        """What has fallen, and its likely cause."""
        if ALIGNMENT in values:
            self._alignments.append(values[ALIGNMENT])
        if ACCURACY not in values:
            return None
        alignment = fmean(self._alignments) if self._alignments else None
        now = Measurement(step, values[ACCURACY], values[LOW], 1 - values[NO_ANSWER], alignment)
        self._alignments.clear()
        if self.best is None or now.accuracy > self.best.accuracy:
            self.best = now
            return ""
        falls = "; ".join(self._falls(now, self.best))
        return falls and f"{falls} at step {self.best.step}. {_cause(now, self.best)}"

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
