"""One update's loss on one micro-batch: teacher states, student states, Eq. 7, and what they show.

Knows models and tensors, not trainers: `Update` is what a trainer calls between rollout and backward.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.anchor import Anchor
from oprd.batch import TERMS, Batch
from oprd.capture import backbone, num_layers
from oprd.comparison import Comparison, States
from oprd.diagnostics import add_representation_cosine
from oprd.freezing import freeze_unreached
from oprd.losses import REPRESENTATION_LOSSES
from oprd.meters import Averages, Stopwatch
from oprd.objective import output_loss, representation_loss
from oprd.output_term import OutputTerm
from oprd.reading import Want, read_states
from oprd.selection import LayerMap
from oprd.settings import ObjectiveSettings
from oprd.teacher import Teacher

logger = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """A loss that is not a number: where, and at which rollouts of the micro-batch."""

    def __init__(self, message: str, rollouts: list[int]) -> None:
        super().__init__(message)
        self.rollouts = rollouts


@dataclass(frozen=True)
class Update:
    """The objective of a run, bound to its two models."""

    settings: ObjectiveSettings
    comparison: Comparison
    student: PreTrainedModel
    teacher: Teacher
    output: OutputTerm
    anchor: Anchor | None
    averages: Averages
    stopwatch: Stopwatch

    @classmethod
    def bind(
        cls,
        settings: ObjectiveSettings,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
        device: torch.device,
    ) -> "Update":
        """Pair the layers, compare widths and vocabularies, and freeze what no term of the run reaches.

        Raises `UserError` where student, teacher and settings do not fit.
        """
        comparison = Comparison.of(settings, student, tokenizer, teacher, device)
        output = OutputTerm.bind(settings, student, tokenizer, teacher)
        anchor = None
        if settings.anchor_schedule.ever_active and comparison.bridge is not None:
            anchor = Anchor.of(student, comparison.bridge, comparison.layer_map.student_layers)
        meters = Averages(), Stopwatch(device)
        update = cls(settings, comparison, student, teacher, output, anchor, *meters)
        if not settings.output_schedule.ever_active and (
            student.get_output_embeddings().weight is student.get_input_embeddings().weight
        ):
            logger.warning("the student's LM head is tied to its input embedding, so it moves along with it")
        if frozen := freeze_unreached(student, settings, comparison.layer_map):
            logger.info("frozen, since no loss reaches it: %s", ", ".join(frozen))
        return update

    def loss(self, batch: Batch, step: int) -> Tensor:
        """μ · representation + w · output (Eq. 7) + a · anchor of one micro-batch at update `step`, 0-based.

        A term of weight zero costs nothing, and a step without any changes nothing. Raises `NonFiniteLoss`.
        """
        weights = {term: schedule(step) for term, schedule in self.settings.schedules.items()}
        student, teacher = self._read(batch, [term for term in TERMS if weights[term] > 0])
        total = torch.zeros((), device=batch.tokens.device, requires_grad=True)
        for term, states in student.items():
            total = total + weights[term] * self._term(term, batch, states, teacher.get(term, {}))
        self.averages.add("loss/total", total)
        return total

    @torch.no_grad()
    def observe(self, batch: Batch, step: int) -> None:
        """Measure on `batch` what `loss` does not show at this step: cosines, entropies, top-k overlap."""
        off = [term for term, schedule in self.settings.schedules.items() if schedule(step) == 0]
        possible = {"representation": self._comparable, "output": self.output.vocabulary is not None}
        student, teacher = self._read(batch, [term for term in off if possible.get(term)])
        if "representation" in student:
            weights = batch.representation_weights[batch.representation_weights > 0]
            wanted = self.comparison.by_student_layer(teacher["representation"])
            add_representation_cosine(self.averages, student["representation"], wanted, weights)
        if "output" in student:
            self.output.observe(self.averages, *_last(student["output"], teacher["output"]))

    @property
    def layer_map(self) -> LayerMap:
        """The pairs of layers that are compared."""
        return self.comparison.layer_map

    @property
    def _comparable(self) -> bool:
        width = backbone(self.student).config.get_text_config().hidden_size
        return self.comparison.bridge is not None or width == self.teacher.width

    def _read(self, batch: Batch, terms: Sequence[str]) -> tuple[dict[str, States], dict[str, States]]:
        """The student's states by term, and what they are held to: the teacher's, or its own former ones."""
        here, norm = self.comparison, self.settings.final_norm
        layers = here.layer_map
        masks = {term: getattr(batch, f"{term}_weights") > 0 for term in terms}
        student_wants, teacher_wants = {}, {}
        for term, mask in masks.items():
            if term == "representation":
                student_wants[term] = Want(layers.student_layers, mask, norm, here.student)
                read = batch.on_teacher(mask)
                teacher_wants[term] = Want(layers.teacher_layers, read, norm, here.teacher)
            elif term == "output":
                student_wants[term] = Want((num_layers(self.student),), mask)
                read = self.output.teacher_mask(batch, mask)
                teacher_wants[term] = Want((self.teacher.num_layers,), read)
            else:
                student_wants[term] = Want(layers.student_layers, mask, norm)
        if not student_wants:
            return {}, {}
        wanted = {}
        if teacher_wants:
            with self.stopwatch.part("teacher"):
                states = self.teacher.read(batch.teacher, list(teacher_wants.values()))
            wanted = dict(zip(teacher_wants, states, strict=True))
        if self.anchor is not None and "anchor" in student_wants:
            wanted["anchor"] = self.anchor.read(batch.student, student_wants["anchor"])
        states = read_states(self.student, batch.student, list(student_wants.values()))
        return dict(zip(student_wants, states, strict=True)), wanted

    def _term(self, term: str, batch: Batch, student: States, wanted: States) -> Tensor:
        if term == "representation":
            return self._representation(batch, student, wanted).mean()
        if term == "output":
            return self._output(batch, student, wanted)
        return self._anchored(batch, student, wanted)

    def _anchored(self, batch: Batch, student: States, reference: States) -> Tensor:
        assert self.anchor is not None and batch.anchor_weights is not None
        mask = batch.anchor_weights > 0
        paired = (batch.representation_weights > 0)[mask]
        weights = batch.anchor_weights[mask]
        per_layer = [
            (self.anchor.rows(layer, rows, reference[layer], paired) * weights.to(rows)).sum()
            for layer, rows in student.items()
        ]
        value = torch.stack(per_layer).mean()
        if not torch.isfinite(value):
            raise NonFiniteLoss("the anchor is not finite", list(range(len(mask))))
        self.averages.add("loss/anchor", value)
        return value

    def _representation(self, batch: Batch, student: States, teacher: States) -> Float[Tensor, " L"]:
        teacher = self.comparison.by_student_layer(teacher)
        mask = batch.representation_weights > 0
        weights = batch.representation_weights[mask]
        assert self.settings.representation_loss is not None
        row_loss = REPRESENTATION_LOSSES[self.settings.representation_loss]
        layers = self.layer_map.student_layers
        per_layer = representation_loss(row_loss, [(s, s) for s in layers], student, teacher, weights)
        if not torch.isfinite(per_layer).all():
            broken = [s for s, value in zip(layers, per_layer, strict=True) if not value.isfinite()]
            rows = torch.stack([row_loss(student[s], teacher[s]) for s in broken]).sum(0)
            raise NonFiniteLoss(
                f"the representation loss is not finite at layers {broken}", _where(rows, mask)
            )
        self.averages.add("loss/representation", per_layer.mean())
        for layer, value in zip(layers, per_layer, strict=True):
            self.averages.add(f"loss/representation_layer_{layer}", value)
        add_representation_cosine(self.averages, student, teacher, weights)
        return per_layer

    def _output(self, batch: Batch, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> Tensor:
        mask, rows = batch.output_weights > 0, _last(student, teacher)
        values = self.output.values(batch, *rows)
        value = output_loss(values, batch.output_weights[mask])
        if not torch.isfinite(value):
            raise NonFiniteLoss("the output loss is not finite, behind the last layer", _where(values, mask))
        self.averages.add("loss/output", value)
        self.output.observe(self.averages, *rows)
        return value


def _last(student: States, teacher: States) -> tuple[Tensor, Tensor]:
    """The final states that an output term reads."""
    (ours,), (theirs,) = student.values(), teacher.values()
    return ours, theirs


def _where(values: Tensor, mask: Tensor) -> list[int]:
    """The rollouts whose supervised rows have a value that is not finite."""
    return sorted(set(mask.nonzero()[:, 0][~torch.isfinite(values)].tolist()))
