"""Where student and teacher rows are compared: in one shared width, or in a bridge's coordinates."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from oprd.bridge import Bridge
from oprd.bridge.identity import check_models, identity
from oprd.foundation.errors import UserError
from oprd.models.capture import backbone, num_layers
from oprd.models.teacher import check_widths
from oprd.objective.selection import LayerMap
from oprd.objective.settings import ObjectiveSettings
from oprd.training.training_pair import TrainingPair

States = dict[int, Tensor]


@dataclass(frozen=True)
class Comparison:
    """The pairs of layers and, unless the models share their coordinates, the bridge between them."""

    layer_map: LayerMap
    bridge: Bridge | None = None

    @classmethod
    def of(cls, settings: ObjectiveSettings, pair: TrainingPair) -> "Comparison":
        """Direct, or through `settings.bridge`; raises `UserError` where models and bridge do not fit."""
        student, teacher = pair.student, pair.teacher
        depth = num_layers(student)
        if settings.bridge is None:
            if settings.representation_schedule.ever_active:
                check_widths(backbone(student).config.get_text_config().hidden_size, depth, teacher)
            return cls(LayerMap.parse(settings.layers, depth, teacher.num_layers))
        bridge = Bridge.load(settings.bridge, settings.bridge_rank)
        check_models(bridge, identity(student, pair.tokenizer), identity(teacher.model, teacher.tokenizer))
        _check_reading(bridge, settings)
        layer_map = bridge.select(settings.layers, depth, teacher.num_layers)
        return cls(layer_map, bridge.to(pair.device))

    def widths(self, student: PreTrainedModel) -> set[int]:
        """The widths of the rows that are compared."""
        if self.bridge is None:
            return {backbone(student).config.get_text_config().hidden_size}
        return {self.bridge.ranks[layer] for layer in self.layer_map.student_layers}

    def student(self, layer: int, rows: Float[Tensor, "N S"]) -> Float[Tensor, "N R"]:
        """The student's rows as they are compared; gradients pass."""
        return rows if self.bridge is None else self.bridge.student(rows, layer)

    def teacher(self, layer: int, rows: Float[Tensor, "N T"]) -> Float[Tensor, "N R"]:
        """Project teacher rows; with several student layers per `layer`, their projections side by side."""
        if self.bridge is None:
            return rows
        return torch.cat([self.bridge.teacher(rows, s) for s in self._students_of(layer)], dim=-1)

    def by_student_layer(self, teacher: States) -> States:
        """What `teacher` gave, one entry per student layer."""
        if self.bridge is None:
            return {s: teacher[t] for s, t in self.layer_map.pairs}
        ranks = self.bridge.ranks
        parts: States = {}
        for layer, rows in teacher.items():
            students = self._students_of(layer)
            split = rows.split([ranks[s] for s in students], dim=-1)
            parts |= dict(zip(students, split, strict=True))
        return parts

    def _students_of(self, teacher_layer: int) -> list[int]:
        return [s for s, t in self.layer_map.pairs if t == teacher_layer]


def _check_reading(bridge: Bridge, settings: ObjectiveSettings) -> None:
    """Refuse states other than those the bridge was fitted on."""
    fitted = bridge.metadata.get("reading", {})
    for key, value in fitted.items():
        found = getattr(settings, key, None)
        if value != (found or {} if isinstance(value, dict) else found):
            raise UserError(
                f"the bridge was fitted with {key}: {value}, the recipe has {found}: use the same, or "
                "fit the bridge again"
            )
