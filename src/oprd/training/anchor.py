"""Keep what a bridge does not determine close to the student's own states before training.

A bridge of rank r constrains r directions of a paired row. It does not constrain the other directions, or
unpaired rows. Without the anchor these drift, and the LM head gets states that it was not trained for.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from oprd.bridge import Bridge
from oprd.models.forward import ModelInput, StateReader, StateRequest
from oprd.models.sharding.fsdp import Sharding
from oprd.objective.losses import relative_mse


@dataclass(frozen=True)
class Anchor:
    """The student as it was, and the directions of every layer that a bridge determines."""

    reference: StateReader
    determined: dict[int, Float[Tensor, "S R"]]

    @classmethod
    def of(cls, student: PreTrainedModel, bridge: Bridge, layers: Sequence[int]) -> "Anchor":
        """Keep a frozen copy of `student`; one with adapters is its own, with these switched off."""
        has_adapters = hasattr(student, "disable_adapter")
        reference = student if has_adapters else copy.deepcopy(student).eval().requires_grad_(False)
        bases = {layer: torch.linalg.qr(bridge.projectors[layer].student.T)[0] for layer in layers}
        return cls(StateReader(reference), bases)

    def place(self, device: torch.device, sharding: Sharding | None) -> None:
        """Put a copy of the student where the student will be: on `device`, or spread over ranks."""
        model: Any = self.reference.model
        if hasattr(model, "disable_adapter"):
            return
        if sharding is not None:
            sharding.shard(self.reference)
        elif model.device.type != device.type:  # DeepSpeed moves the student later
            model.to(device)

    @torch.no_grad()
    def read(self, model_input: ModelInput, request: StateRequest) -> dict[int, Tensor]:
        """The states that the student had for these rows before training."""
        model: Any = self.reference.model
        with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
            (states,) = self.reference(model_input, [request])
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
