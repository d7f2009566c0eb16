"""DeepSpeed's ZeRO: what its partitioned weights rule out, and models that are to be loaded without it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.integrations import deepspeed

from oprd.foundation.errors import UserError
from oprd.models.capture import backbone
from oprd.objective.settings import ObjectiveSettings

logger = logging.getLogger(__name__)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside it one rank may load a model alone, which under ZeRO-3 is otherwise collective."""
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def check_zero3(student: nn.Module, settings: ObjectiveSettings) -> None:
    """Raise `UserError` for what DeepSpeed's partitioning rules out: only a module that runs has weights."""
    causal: Any = student
    if getattr(backbone(student), "_is_stateful", False):
        logger.warning(
            "under ZeRO-3 it is not tried whether the student's recurrent layers mask padding: where they do "
            "not, micro-batches change the result"
        )
    if settings.output_schedule.ever_active or settings.diagnostics_steps:
        raise UserError(
            "output losses and diagnostics_steps use the LM heads outside the models, where ZeRO-3 has no "
            "weights: use FSDP2 (recipes/accelerate), ZeRO-2, or output_loss: none with diagnostics_steps: 0"
        )
    if settings.anchor_schedule.ever_active and not hasattr(causal, "disable_adapter"):
        raise UserError("anchor_weight copies the student, which ZeRO-3 partitions: use FSDP2 or ZeRO-2")
