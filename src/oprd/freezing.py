"""What no loss of a run can train is frozen: no gradient, no weight decay, no optimiser state."""

from typing import Any

from torch import nn

from oprd.capture import backbone, blocks, num_layers
from oprd.selection import LayerMap
from oprd.settings import ObjectiveSettings

ABOVE = ("final_layer_norm", "project_out")  # what OPT declares before its blocks and runs after them


def freeze_unreached(student: nn.Module, settings: ObjectiveSettings, layer_map: LayerMap) -> list[str]:
    """Freeze what no term of the run can train, so that nothing is kept or decayed for it.

    Without an output loss that is the LM head, if untied, and everything above the deepest layer.
    Returns what was frozen, in words.
    """
    if settings.output_schedule.ever_active:
        return []
    frozen = []
    model: Any = student
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        head.requires_grad_(False)
        frozen.append("the LM head")
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
