"""Losses that are not numbers: noted on the device while a step runs, told once it has."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """A loss that is not a number: which, and what the rollouts were that it came from."""

    def __init__(self, message: str, rollouts: list[Int[Tensor, " S"]]) -> None:
        super().__init__(message)
        self.rollouts = rollouts


@dataclass(frozen=True)
class _Note:
    what: str
    layer: int | None
    finite: Bool[Tensor, " N"]
    mask: Bool[Tensor, "B T"]
    input_ids: Int[Tensor, "B S"]


class FiniteWatch:
    """Notes of a step's row losses; asking for them waits for the device, so it is done once a step."""

    def __init__(self) -> None:
        self._notes: list[_Note] = []

    def add(
        self,
        what: str,
        layer: int | None,
        values: Float[Tensor, " N"],
        mask: Bool[Tensor, "B T"],
        input_ids: Int[Tensor, "B S"],
    ) -> None:
        """Note the values of the rows of `mask`, of rollouts that read `input_ids`."""
        self._notes.append(_Note(what, layer, values.detach().isfinite(), mask, input_ids))

    def clear(self) -> None:
        """Forget what was noted."""
        self._notes = []

    def check(self) -> None:
        """Raise `NonFiniteLoss` if a value since the last check was not finite, and forget them all."""
        notes, self._notes = self._notes, []
        if not notes:
            return
        whole = torch.stack([note.finite.all().to(notes[0].finite.device) for note in notes]).tolist()
        broken = [note for note, good in zip(notes, whole, strict=True) if not good]
        if broken:
            raise _told([note for note in broken if note.what == broken[0].what])


def _told(notes: list[_Note]) -> NonFiniteLoss:
    """One error for all layers, with the rollouts of the first micro-batch."""
    first = notes[0]
    layers = sorted({note.layer for note in notes if note.layer is not None})
    where = f"at layers {layers}" if layers else "behind the last layer"
    rows = first.mask.nonzero()[:, 0][~first.finite.to(first.mask.device)]
    rollouts = [first.input_ids[i] for i in sorted(set(rows.tolist()))]
    return NonFiniteLoss(f"{first.what} is not finite {where}", rollouts)
