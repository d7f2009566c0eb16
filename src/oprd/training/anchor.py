"""Keep what a bridge does not determine close to the student's own states before training.

A bridge of rank r constrains r directions of a paired row. It does not constrain the other directions, or
unpaired rows. Without the anchor these drift, and the LM head gets states that it was not trained for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from oprd.bridge import Bridge
from oprd.models.forward import ModelInput, StateRequest
from oprd.models.initial_student import InitialStudent
from oprd.models.sharding.fsdp import Sharding
from oprd.objective.losses import relative_mse


@dataclass(frozen=True)
class Anchor:
    """The student as it was, and the directions of every layer that a bridge determines."""

    reference: InitialStudent
    determined: dict[int, Float[Tensor, "S R"]]

    @classmethod
    def of(cls, student: PreTrainedModel, bridge: Bridge, layers: Sequence[int]) -> "Anchor":
        """Keep `student` as it is now, and what `bridge` determines of its `layers`."""
        bases = {layer: torch.linalg.qr(bridge.projectors[layer].student.T)[0] for layer in layers}
        return cls(InitialStudent(student), bases)

    def place(self, device: torch.device, sharding: Sharding | None) -> None:
        """Put the initial student where the student will be: on `device`, or spread over ranks."""
        self.reference.place(device, sharding)

    def read(self, model_input: ModelInput, request: StateRequest) -> dict[int, Tensor]:
        """The states that the student had for these rows before training."""
        (states,) = self.reference.read(model_input, [request])
        return states

    def rows(
        self,
        layer: int,
        student: Float[Tensor, "N S"],
        reference: Float[Tensor, "N S"],
        *,
        paired: Bool[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """‖d‖² / ‖h_ref‖² of every row, d being h_θ − h_ref less, where paired, its determined directions."""
        wide = student.to(torch.promote_types(student.dtype, torch.float32))
        basis = self.determined[layer].to(wide)
        with torch.autocast(wide.device.type, enabled=False):
            determined = (wide - reference) @ basis @ basis.T
        return relative_mse(wide - determined * paired[:, None], reference)
