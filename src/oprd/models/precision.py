"""The teacher computes as the student does, so that equal weights give equal states to the bit.

Under autocast a student has float32 weights and a float32 residual stream; only its matrix products are in
half precision. A teacher that computes in half precision throughout rounds that stream after every block.
That rounding would be a floor under every loss of hidden states (docs/method.md has it measured).
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Precision:
    """How a student computes: the dtype of its weights in a forward, and whether autocast is on."""

    student: PreTrainedConfig
    weights: torch.dtype
    autocast: bool

    @classmethod
    def of(cls, student: PreTrainedModel, settings: Any, distributed: DistributedType) -> "Precision":
        """The precision of `student` in a run with the keys of `settings`, before it is sharded."""
        half = torch.bfloat16 if settings.bf16 else torch.float16 if settings.fp16 else None
        weights = _table(student).dtype
        # DeepSpeed and FSDP2 cast the weights themselves.
        casts = distributed in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        is_autocast = half is not None and distributed != DistributedType.DEEPSPEED
        return cls(student.config, half if casts and half else weights, is_autocast)

    def of_teacher(self, teacher: PreTrainedConfig, is_quantized: bool = False) -> torch.dtype | str:
        """The dtype to load a teacher in: the student's, or under autocast its file's if it is another kind.

        States of another architecture or width, and of quantised weights, differ by far more than rounding,
        and such a teacher may be large.
        """
        is_quantized = is_quantized or hasattr(teacher, "quantization_config")
        own = self.autocast and (is_quantized or not self.is_like(teacher))
        return "auto" if own else self.weights

    def is_like(self, teacher: PreTrainedConfig) -> bool:
        """Whether a teacher may hold the student's own weights: one architecture, one width."""
        ours, theirs = self.student.get_text_config(), teacher.get_text_config()
        return (ours.model_type, ours.hidden_size) == (theirs.model_type, theirs.hidden_size)

    def warn_of_rounding(self, teacher: PreTrainedModel) -> None:
        """Tell the user of a teacher, loaded as they asked, whose states differ by rounding alone."""
        theirs = _table(teacher).dtype
        if self.is_like(teacher.config) and theirs != self.weights:
            logger.warning(
                "the teacher computes in %s and the student in %s: states of equal models differ by that "
                "rounding, which no training removes; leave the teacher's dtype out to have it compute alike",
                *(str(dtype).removeprefix("torch.") for dtype in (theirs, self.weights)),
            )


def half_precision(model: Any) -> torch.dtype | None:
    """The half precision that a model has weights in, if it has."""
    halves = {weight.dtype for weight in model.parameters()} & {torch.bfloat16, torch.float16}
    return next(iter(halves), None)


def own_autocast(model: Any) -> torch.autocast:
    """Autocast as a model needs it by itself: one with linear layers in half precision beside others."""
    half, device = half_precision(model), model.device
    if device.type == "meta":  # offloaded: its blocks run elsewhere
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.autocast(device.type, half, enabled=half is not None and model.dtype != half)


@torch.no_grad()
def store_products_in(stored: torch.dtype | None, model: PreTrainedModel, is_exact: bool = False) -> None:
    """Keep in the file's half precision the weights that autocast multiplies in half precision anyway.

    Those are linear layers, whose results stay the same to the bit; norms, embeddings and experts, which
    autocast leaves alone, keep their dtype. A weight that `stored` would round keeps its own too, unless
    `is_exact` says that none would be.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return
    table = _table(model)
    for layer in model.modules():
        if not (type(layer).forward is nn.Linear.forward or isinstance(layer, Conv1D)):
            continue
        weight: Any = layer.weight
        if weight is table or weight.dtype.itemsize <= stored.itemsize:
            continue
        half = weight.to(stored)
        if is_exact or (not half.is_meta and torch.equal(half.to(weight.dtype), weight)):
            weight.data = half


def _table(model: PreTrainedModel) -> Tensor:
    """The weight of a model's input embedding."""
    embedding: Any = model.get_input_embeddings()
    return embedding.weight
