"""An update that counts the memory of its parts, where a run's update counts their seconds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from oprd.bridge.artifact import TENSORS
from oprd.foundation.meters import Stopwatch
from oprd.preflight.planning.footprint import Footprint
from oprd.preflight.planning.parts import LOGITS, READING, REFERENCE
from oprd.training.output_term import OutputTerm
from oprd.training.step import Update


def counted(update: Update, footprint: Footprint) -> Update:
    """The same update, whose bridge, anchor, teacher's forward and output loss are parts of `footprint`."""
    for tensor in _references(update):
        footprint.hold(tensor, REFERENCE)
    term = update.output
    output = _Output(term.settings, term.student, term.teacher, term.vocabulary, term.heads, footprint)
    return replace(update, stopwatch=_Parts(footprint), output=output)


class _Parts(Stopwatch):
    def __init__(self, footprint: Footprint) -> None:
        self._footprint = footprint

    def part(self, name: str) -> Any:
        return self._footprint.part(READING)


@dataclass(frozen=True)
class _Output(OutputTerm):
    footprint: Footprint

    def loss(self, *args: Any) -> Any:
        with self.footprint.part(LOGITS):
            return super().loss(*args)


def _references(update: Update) -> Iterator[Tensor]:
    """The tensors of an update's bridge and anchor that belong to neither model."""
    if update.comparison.bridge is not None:
        for projector in update.comparison.bridge.projectors.values():
            yield from (getattr(projector, name) for name in TENSORS)
    if update.anchor is not None:
        yield from update.anchor.determined.values()
        if update.anchor.reference.model is not update.student:
            yield from update.anchor.reference.parameters()
