"""What DeepSpeed's ZeRO, with its partitioned weights, rules out."""

import logging
from typing import Any

from torch import nn

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.transformers import is_recurrent
from oprd.models.capture import backbone
from oprd.objective.settings import ObjectiveSettings

logger = logging.getLogger(__name__)


def check_zero3(student: nn.Module, settings: ObjectiveSettings) -> None:
    """Raise `UserError` for what DeepSpeed's partitioning rules out: only a module that runs has weights."""
    causal: Any = student
    if is_recurrent(backbone(student)):
        logger.warning(
            "under ZeRO-3 it is not tried whether the student's recurrent layers mask padding: where they do "
            "not, micro-batches change the result"
        )
    if settings.row_weights == "importance":
        raise UserError(
            "row_weights: importance uses the LM heads, where ZeRO-3 has no weights: use FSDP2 or ZeRO-2"
        )
    if settings.output_schedule.ever_active or settings.diagnostics_steps:
        raise UserError(
            "output losses and diagnostics_steps use the LM heads outside the models, where ZeRO-3 has no "
            "weights: use FSDP2 (recipes/accelerate), ZeRO-2, or output_loss: none with diagnostics_steps: 0"
        )
    if settings.teacher_extrapolation != 1:
        raise UserError(
            "teacher_extrapolation reads a third model, which ZeRO-3 does not: use FSDP2 or ZeRO-2"
        )
    if settings.anchor_schedule.ever_active and not hasattr(causal, "disable_adapter"):
        raise UserError("anchor_weight copies the student, which ZeRO-3 partitions: use FSDP2 or ZeRO-2")
