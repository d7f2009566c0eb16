"""The student as it was before training, which losses may compare with."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oprd.models.forward import ModelInput, StateReader, StateRequest
from oprd.models.sharding.fsdp import Sharding


class InitialStudent:
    """A frozen copy of the student; one with adapters is its own, with these off, and takes no memory.

    It is made before the first step, and in a resumed run before the checkpoint is read.
    """

    def __init__(self, student: PreTrainedModel) -> None:
        self._is_copy = not hasattr(student, "disable_adapter")
        self.model: Any = copy.deepcopy(student).eval().requires_grad_(False) if self._is_copy else student
        self.reader = StateReader(self.model)

    def place(self, device: torch.device, sharding: Sharding | None = None, offload: bool = False) -> None:
        """Put a copy where the student will be: on `device`, or spread over ranks, on the host if asked."""
        if not self._is_copy:
            return
        if sharding is not None:
            sharding.shard(self.reader, offload)
        elif self.model.device.type != device.type:  # DeepSpeed moves the student later
            self.model.to(device)

    @torch.no_grad()
    def read(
        self, model_input: ModelInput, requests: Sequence[StateRequest], padding_free: bool | None = None
    ) -> list[dict[int, Tensor]]:
        """`read_states` of the student as it was."""
        with self._as_it_was():
            return self.reader(model_input, requests, padding_free)

    def _as_it_was(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._is_copy else self.model.disable_adapter()
