"""Which parameters of a run are trained: none that no loss reaches, none of the teacher's, and not none."""

import copy
import logging
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from oprd.foundation.errors import UserError
from oprd.foundation.foreign.torch import is_fake
from oprd.models.capture import backbone, blocks, num_layers
from oprd.objective.selection import LayerMap
from oprd.objective.settings import ObjectiveSettings

logger = logging.getLogger(__name__)

ABOVE = ("final_layer_norm", "project_out")  # what OPT declares before its blocks and runs after them


def apart_from(student: Any, teacher: Any) -> Any:
    """`teacher`, or a copy of it where freezing it would freeze parameters of `student`.

    Of a model that the student's adapters were put into, the copy is the model without them.
    """
    if isinstance(student, str) or isinstance(teacher, str) or not _shared(student, teacher):
        return teacher
    logger.info("the teacher shares parameters with the student: it is copied, and takes memory of its own")
    if teacher is not student and hasattr(student, "unload") and teacher is student.get_base_model():
        return copy.deepcopy(student).unload()
    return copy.deepcopy(teacher)


def check_trainable(student: nn.Module) -> None:
    """Raise `UserError` for a student of which nothing would be trained."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(
            "the student has no parameter to train: all are frozen, or none is reached by a loss; call "
            "requires_grad_(True), or put adapters into the layers that are compared"
        )


def freeze_unreached(student: nn.Module, settings: ObjectiveSettings, layer_map: LayerMap) -> list[str]:
    """Freeze what no term of the run can train, so that nothing is kept or decayed for it.

    Without an output loss that is the LM head, if untied, and everything above the deepest layer.
    Returns what was frozen, in words.
    """
    if settings.output_schedule.ever_active:
        return []
    frozen = []
    model: Any = student
    tied = _shared(model.get_output_embeddings(), model.get_input_embeddings())
    if not tied:
        model.get_output_embeddings().requires_grad_(False)
        frozen.append("the LM head")
    elif any(parameter.requires_grad for parameter in tied):
        logger.warning("the student's LM head is tied to its input embedding, so it moves along with it")
    deepest, depth = max(layer_map.student_layers), num_layers(student)
    if deepest < depth:
        blocks(student)[deepest:].requires_grad_(False)
        frozen.append(f"layers {deepest + 1} to {depth}")
    if deepest < depth or not settings.final_norm:
        children = dict(backbone(student).named_children())
        first_above = list(children.values()).index(blocks(student)) + 1
        for place, (name, child) in enumerate(children.items()):
            if place >= first_above or name.startswith(ABOVE):
                child.requires_grad_(False)
        frozen.append("the final norm")
    return frozen


def _shared(one: nn.Module, other: nn.Module) -> list[nn.Parameter]:
    """The parameters of `one` that are parameters of `other`, or lie in the same memory."""
    places = {_place(parameter) for parameter in other.parameters()}
    return [parameter for parameter in one.parameters() if _place(parameter) in places]


def _place(parameter: nn.Parameter) -> int:
    """Where a parameter's values lie; itself, where they are elsewhere."""
    has_memory = not (parameter.is_meta or isinstance(parameter, DTensor) or is_fake(parameter))
    return (has_memory and parameter.untyped_storage().data_ptr()) or id(parameter)
