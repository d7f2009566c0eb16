"""Steps in which a term has no row to supervise: a warning names the cause; a run of nothing else fails."""

import logging
from collections.abc import Mapping, Sequence

from oprd.foundation.errors import Fault
from oprd.objective.settings import ObjectiveSettings
from oprd.objective.terms import OUTPUT, REPRESENTATION

logger = logging.getLogger(__name__)

COUNTED_TERMS = (REPRESENTATION, OUTPUT)  # whose rows a step records
REMIND_AFTER = 10  # steps in a row


class SupervisionWatch:
    """Tracks how many rows each loss term supervised, from the recorded metrics.

    `rollout/<term>_rows` is summed over ranks, so every rank comes to the same end.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        self._settings = settings
        self._in_a_row = dict.fromkeys(COUNTED_TERMS, 0)
        self._warned: set[str] = set()
        self._steps = self._empty = 0

    def resume(self, records: Sequence[Mapping[str, float]]) -> None:
        """Count the steps that a resumed run has behind it."""
        for record in records:
            self._count(int(record["step"]), record)

    def observe(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """Warn of the first step, and of the tenth in a row, in which a term was active and had no row."""
        for term in self._count(step, values):
            in_a_row = self._in_a_row[term]
            if term not in self._warned or in_a_row == REMIND_AFTER:
                self._warned.add(term)
                so_far = f" in {in_a_row} steps" if in_a_row > 1 else ""
                cause = self._cause(values)
                logger.warning(
                    "step %d: the %s term had no row to supervise%s: %s", step, term, so_far, cause
                )
        return {}

    def tell(self) -> None:
        """Warn at the end of a run of the steps that supervised nothing."""
        if self._empty:
            logger.warning("%d of %d steps supervised nothing", self._empty, self._steps)

    def check(self) -> None:
        """Raise `Fault` if no step supervised anything."""
        if self._empty and self._empty == self._steps:
            raise Fault(
                "no step supervised anything, so the student has not changed and is not saved again; the "
                "warning of the first step names the cause"
            )

    def _count(self, step: int, values: Mapping[str, float]) -> list[str]:
        """The terms that were active in this step and had no row."""
        rows = {
            term: values[f"rollout/{term}_rows"]
            for term in self._in_a_row
            if f"rollout/{term}_rows" in values and self._settings.schedules[term](step - 1) > 0
        }
        empty = [term for term, count in rows.items() if count == 0]
        for term in rows:
            self._in_a_row[term] = self._in_a_row[term] + 1 if term in empty else 0
        self._steps += bool(rows)
        self._empty += bool(rows) and len(empty) == len(rows)
        return empty

    def _cause(self, values: Mapping[str, float]) -> str:
        if values.get("rollout/mean_length") == 0:
            return "all responses are empty"
        if self._settings.mask_truncated_completions and values.get("rollout/truncated_share") == 1:
            return (
                "all rollouts reached max_completion_length, and mask_truncated_completions leaves those "
                "out: raise the length limit, or unset mask_truncated_completions"
            )
        if "rollout/coverage" in values:
            return (
                f"{values['rollout/coverage']:.0%} of the student's rows are paired with the teacher's, "
                "and output losses use only complete spans of text, or rows before a token that both have"
            )
        return "all tokens are tool output or beyond the vocabulary that both models share"
