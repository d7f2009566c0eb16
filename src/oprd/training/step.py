"""One update's loss on one micro-batch: teacher states, student states, Eq. 7, and what they show.

Knows models and tensors, not trainers: `Update` is what a trainer calls between rollout and backward.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.foundation.meters import Averages, Stopwatch
from oprd.models.activation_checkpointing import attention_kept
from oprd.models.capture import backbone, num_layers
from oprd.models.finite import FiniteWatch
from oprd.models.forward import Want, read_states
from oprd.models.freezing import check_trainable, freeze_unreached
from oprd.models.lm_head import check_head
from oprd.models.sharding.fsdp import Sharding
from oprd.models.teacher import Teacher
from oprd.objective.composite import weighted_loss
from oprd.objective.custom_loss import CustomLoss, row_loss
from oprd.objective.selection import LayerMap
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.rows import TERMS, Batch, SupervisedRows
from oprd.training.anchor import Anchor
from oprd.training.comparison import Comparison, States
from oprd.training.diagnostics import add_representation_cosine
from oprd.training.output_term import OutputTerm

logger = logging.getLogger(__name__)

Terms = dict[str, SupervisedRows]
AtLayer = Callable[[int, Tensor], Tensor]


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
    watch: FiniteWatch

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
        check_head(student, settings.output_schedule.ever_active)
        comparison = Comparison.of(settings, student, tokenizer, teacher, device)
        if isinstance(settings.representation_loss, CustomLoss):
            for width in comparison.widths(student):
                settings.representation_loss.check(width, device)
        output = OutputTerm.bind(settings, student, tokenizer, teacher)
        anchor = None
        if settings.anchor_schedule.ever_active and comparison.bridge is not None:
            anchor = Anchor.of(student, comparison.bridge, comparison.layer_map.student_layers)
        meters = Averages(), Stopwatch(device), FiniteWatch()
        update = cls(settings, comparison, student, teacher, output, anchor, *meters)
        if comparison.bridge is not None and output.vocabulary is None and anchor is None:
            logger.warning(
                "across tokenizers many rows have no counterpart, and a bridge without an anchor lets the "
                "student's states there drift until it writes nothing sensible: set anchor_weight: 1"
            )
        if frozen := freeze_unreached(student, settings, comparison.layer_map):
            logger.info("frozen, since no loss reaches it: %s", ", ".join(frozen))
        check_trainable(student)
        return update

    def place(self, device: torch.device, sharding: Sharding | None) -> None:
        """Put the frozen models where they are read: on `device`, or spread over ranks as the student is."""
        self.teacher.place(device, sharding, self.settings.teacher_offload)
        if self.anchor is not None:
            self.anchor.place(device, sharding)

    def loss(self, batch: Batch, step: int) -> Tensor:
        """μ · representation + w · output (Eq. 7) + a · anchor of one micro-batch at update `step`, 0-based.

        A term of weight zero costs nothing, and a step without any changes nothing.
        """
        weights = {term: schedule(step) for term, schedule in self.settings.schedules.items()}
        rows = {term: batch.rows(term) for term in TERMS if weights[term] > 0}
        wanted = self._wanted(batch, rows)
        at_layer = {
            term: partial(compare, batch, rows, wanted.get(term, {}))
            for term, compare in (("representation", self._representation), ("anchor", self._anchored))
        }
        read = self._read(batch, rows, at_layer)
        total = torch.zeros((), device=batch.tokens.device, requires_grad=True)
        for term, result in read.items():
            if term == "output":
                value = self._output(batch, rows[term], *_last(result, wanted[term]))
            else:
                value = torch.stack([one.to(total.device) for one in result.values()]).mean()
            self.averages.add(f"loss/{term}", value)
            total = total + weights[term] * value
        self.averages.add("loss/total", total)
        return total

    @torch.no_grad()
    def observe(self, batch: Batch, step: int) -> None:
        """Measure on `batch` what `loss` does not show at this step: cosines, entropies, top-k overlap."""
        off = [term for term, schedule in self.settings.schedules.items() if schedule(step) == 0]
        possible = {"representation": self._comparable, "output": self.output.vocabulary is not None}
        rows = {term: batch.rows(term) for term in off if possible.get(term)}
        wanted = self._wanted(batch, rows)
        for term, states in self._read(batch, rows, {"representation": self.comparison.student}).items():
            if term == "output":
                self.output.observe(self.averages, *_last(states, wanted[term]))
                continue
            for layer, here in states.items():
                there, weights = wanted[term][layer], rows[term].weights
                add_representation_cosine(self.averages, layer, here, there, weights)

    @property
    def layers_read(self) -> tuple[list[int], list[int]]:
        """The student's layers, and the teacher's, that any step of the run reads."""
        ours: set[int] = set()
        theirs: set[int] = set()
        compared = self.settings.representation_schedule, self.settings.anchor_schedule
        if self.settings.diagnostics_steps or any(schedule.ever_active for schedule in compared):
            ours.update(self.layer_map.student_layers)
            theirs.update(self.layer_map.teacher_layers)
        if self.settings.output_schedule.ever_active:
            ours.add(num_layers(self.student))
            theirs.add(self.teacher.num_layers)
        return sorted(ours), sorted(theirs)

    @property
    def layer_map(self) -> LayerMap:
        """The pairs of layers that are compared."""
        return self.comparison.layer_map

    @property
    def _comparable(self) -> bool:
        width = backbone(self.student).config.get_text_config().hidden_size
        return self.comparison.bridge is not None or width == self.teacher.width

    def _wanted(self, batch: Batch, rows: Terms) -> dict[str, States]:
        """By term, what the student's states are held to: the teacher's, or its own former ones."""
        here, norm, wants = self.comparison, self.settings.final_norm, {}
        if "representation" in rows:
            read = batch.on_teacher(rows["representation"].mask)
            wants["representation"] = Want(here.layer_map.teacher_layers, read, norm, here.teacher)
        if "output" in rows:
            read = self.output.teacher_mask(batch, rows["output"].mask)
            wants["output"] = Want((self.teacher.num_layers,), read)
        wanted: dict[str, States] = {}
        if wants:
            with self.stopwatch.part("teacher"):
                states = self.teacher.read(batch.teacher, list(wants.values()), self.settings.padding_free)
            wanted = dict(zip(wants, states, strict=True))
        if "representation" in wanted:
            wanted["representation"] = here.by_student_layer(wanted["representation"])
        if self.anchor is not None and "anchor" in rows:
            want = Want(here.layer_map.student_layers, rows["anchor"].mask, norm)
            wanted["anchor"] = self.anchor.read(batch.student, want)
        return wanted

    def _read(self, batch: Batch, rows: Terms, at_layer: Mapping[str, AtLayer]) -> dict[str, States]:
        """One forward of the student: by term and layer, what `at_layer` makes of its states, or these."""
        layers, norm = self.layer_map.student_layers, self.settings.final_norm
        wants = {
            term: Want((num_layers(self.student),), here.mask)
            if term == "output"
            else Want(layers, here.mask, norm, at_layer.get(term))
            for term, here in rows.items()
        }
        if not wants:
            return {}
        with attention_kept(self.student) if self.settings.keep_attention else nullcontext():
            states = read_states(
                self.student, batch.student, list(wants.values()), self.settings.padding_free
            )
        return dict(zip(wants, states, strict=True))

    def _representation(
        self, batch: Batch, rows: Terms, teacher: States, layer: int, states: Tensor
    ) -> Tensor:
        """Eq. 6 or 14 at one layer, while the forward is there; the teacher's rows are let go."""
        assert self.settings.representation_loss is not None
        loss, here = row_loss(self.settings.representation_loss), rows["representation"]
        student, wanted = self.comparison.student(layer, states), teacher.pop(layer)
        value, values = weighted_loss(loss, student, wanted, here.weights)
        self.watch.add("the representation loss", layer, values, here.mask, batch.student.input_ids)
        self.averages.add(f"loss/representation_layer_{layer}", value)
        add_representation_cosine(self.averages, layer, student, wanted, here.weights)
        return value

    def _anchored(self, batch: Batch, rows: Terms, reference: States, layer: int, states: Tensor) -> Tensor:
        assert self.anchor is not None
        here, paired = rows["anchor"], batch.representation_weights > 0
        loss = partial(self.anchor.rows, layer, paired=paired[here.mask].to(states.device))
        value, values = weighted_loss(loss, states, reference.pop(layer), here.weights)
        self.watch.add("the anchor", layer, values, here.mask, batch.student.input_ids)
        return value

    def _output(self, batch: Batch, here: SupervisedRows, student: Tensor, teacher: Tensor) -> Tensor:
        value, values = self.output.loss(batch, here, student, teacher, self.averages)
        self.watch.add("the output loss", None, values, here.mask, batch.student.input_ids)
        return value.to(batch.tokens.device)


def _last(student: States, teacher: States) -> tuple[Tensor, Tensor]:
    """The final states that an output term reads."""
    (ours,), (theirs,) = student.values(), teacher.values()
    return ours, theirs
