"""What one step does: Eq. 7 on one micro-batch of rollouts.

`Update.loss` reads top to bottom: which rows each term supervises; what the teacher's states there are
(`_targets`); one forward of the student, in which each layer's loss is computed where its states are
(`layer_losses.py`, `output_term.py`); the weighted sum. Knows models and tensors, not trainers.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from oprd.foundation.meters import Averages, Stopwatch
from oprd.models.activation_checkpointing import attention_kept
from oprd.models.capture import backbone, num_layers
from oprd.models.finite import FiniteWatch
from oprd.models.forward import StateRequest, read_states
from oprd.models.freezing import check_trainable, freeze_unreached
from oprd.models.lm_head import check_head
from oprd.models.sharding.fsdp import Sharding
from oprd.models.teacher import Teacher
from oprd.objective.custom_loss import CustomLoss, row_loss
from oprd.objective.emphasis import by_gap
from oprd.objective.selection import LayerMap
from oprd.objective.settings import ObjectiveSettings
from oprd.objective.terms import ANCHOR, OUTPUT, REPRESENTATION, TERMS
from oprd.rollouts.rows import RolloutBatch, SupervisedRows
from oprd.training.anchor import Anchor
from oprd.training.comparison import Comparison, States
from oprd.training.diagnostics import add_representation_cosine
from oprd.training.extrapolation import Extrapolation
from oprd.training.importance_rows import RowsByTerm, by_importance
from oprd.training.layer_losses import AnchorLoss, RepresentationLoss
from oprd.training.output_term import OutputTerm
from oprd.training.training_pair import TrainingPair

logger = logging.getLogger(__name__)

Targets = dict[str, States]  # by term and layer, what the student's states are compared with
REFERENCE = "reference"  # among targets: the final states of what the teacher is extrapolated from
AtLayer = Callable[[int, Tensor], Tensor]  # what the forward turns a layer's states into


@dataclass(frozen=True)
class Update:
    """The objective of a run, bound to its two models."""

    settings: ObjectiveSettings
    comparison: Comparison
    student: PreTrainedModel
    teacher: Teacher
    output: OutputTerm
    anchor: Anchor | None
    extrapolation: Extrapolation | None
    averages: Averages
    stopwatch: Stopwatch
    watch: FiniteWatch

    @classmethod
    def bind(cls, settings: ObjectiveSettings, pair: TrainingPair) -> "Update":
        """Pair the layers, and compare widths and vocabularies.

        Raises `UserError` where student, teacher and settings do not fit.
        """
        student, device = pair.student, pair.device
        check_head(student, settings.output_schedule.ever_active)
        comparison = Comparison.of(settings, pair)
        if isinstance(settings.representation_loss, CustomLoss):
            for width in comparison.widths(student):
                settings.representation_loss.check(width, device)
        extrapolation = Extrapolation.of(settings, pair)
        output = OutputTerm.bind(settings, pair, extrapolation)
        anchor = None
        if settings.anchor_schedule.ever_active and comparison.bridge is not None:
            anchor = Anchor.of(student, comparison.bridge, comparison.layer_map.student_layers)
        meters = Averages(), Stopwatch(device), FiniteWatch()
        if comparison.bridge is not None and output.vocabulary is None and anchor is None:
            logger.warning(
                "across tokenizers many rows are not paired, and through a bridge without an anchor their "
                "states drift until the student's text degenerates: set anchor_weight: 1"
            )
        return cls(settings, comparison, student, pair.teacher, output, anchor, extrapolation, *meters)

    def freeze_unreached(self) -> None:
        """Freeze what no term of the run reaches; raises `UserError` where nothing is left to train."""
        if frozen := freeze_unreached(self.student, self.settings, self.layer_map):
            logger.info("frozen, since no loss gives it a gradient: %s", ", ".join(frozen))
        check_trainable(self.student)

    def place(self, device: torch.device, sharding: Sharding | None) -> None:
        """Put the frozen models where they are read: on `device`, or spread over ranks as the student is."""
        self.teacher.place(device, sharding, self.settings.teacher_offload)
        if self.anchor is not None:
            self.anchor.place(device, sharding)
        if self.extrapolation is not None:
            self.extrapolation.reference.place(device, sharding, self.settings.teacher_offload)

    def loss(self, batch: RolloutBatch, step: int) -> Tensor:
        """μ · representation + w · output (Eq. 7) + a · anchor of one micro-batch at update `step`, 0-based.

        A term of weight zero is not computed; if all are zero, the loss is zero.
        """
        weights = {term: schedule(step) for term, schedule in self.settings.schedules.items()}
        rows = {term: batch.rows(term) for term in TERMS if weights[term] > 0}
        if self.settings.row_weights == "importance":
            written = batch.rows(ANCHOR).mask  # whatever rows the terms supervise
            rows = by_importance(rows, written, partial(self._advantages, batch))
        targets = self._targets(batch, rows)
        losses = self._losses(batch, rows, targets)
        total = torch.zeros((), device=batch.tokens.device, requires_grad=True)
        for term, loss in losses.items():
            self.averages.add(f"loss/{term}", loss)
            total = total + weights[term] * loss
        self.averages.add("loss/total", total)
        return total

    @torch.no_grad()
    def _advantages(self, batch: RolloutBatch, mask: Bool[Tensor, "B T"]) -> Float[Tensor, " N"]:
        """log p − log q of the sampled tokens at the rows of `mask`: one more forward of both models."""
        request = StateRequest((self.teacher.num_layers,), batch.on_teacher(mask))
        (theirs,) = self.teacher.read(batch.teacher, [request], self.settings.padding_free)
        rows = SupervisedRows(mask, torch.ones_like(batch.output_weights[mask]))
        ours = self._student_forward(batch, {OUTPUT: rows}, {})[OUTPUT]
        return self.output.advantages(batch, mask, _last(ours), _last(theirs))

    @torch.no_grad()
    def observe(self, batch: RolloutBatch, step: int) -> None:
        """Log diagnostics of the terms that are off at this step: cosines, entropies, top-k overlap."""
        off = [term for term, schedule in self.settings.schedules.items() if schedule(step) == 0]
        possible = {REPRESENTATION: self._comparable, OUTPUT: self.output.vocabulary is not None}
        rows = {term: batch.rows(term) for term in off if possible.get(term)}
        targets = self._targets(batch, rows)
        student = self._student_forward(batch, rows, {REPRESENTATION: self.comparison.student})
        for layer, states in student.get(REPRESENTATION, {}).items():
            target, weights = targets[REPRESENTATION][layer], rows[REPRESENTATION].weights
            add_representation_cosine(self.averages, layer, states, target, weights)
        if OUTPUT in student:
            self.output.observe(self.averages, _last(student[OUTPUT]), _last(targets[OUTPUT]))

    @property
    def layers_read(self) -> tuple[list[int], list[int]]:
        """The student's layers, and the teacher's, that any step of the run reads."""
        student_layers: set[int] = set()
        teacher_layers: set[int] = set()
        compared = self.settings.representation_schedule, self.settings.anchor_schedule
        if self.settings.diagnostics_steps or any(schedule.ever_active for schedule in compared):
            student_layers.update(self.layer_map.student_layers)
            teacher_layers.update(self.layer_map.teacher_layers)
        if self.settings.output_schedule.ever_active:
            student_layers.add(num_layers(self.student))
            teacher_layers.add(self.teacher.num_layers)
        return sorted(student_layers), sorted(teacher_layers)

    @property
    def layer_map(self) -> LayerMap:
        """The pairs of layers that are compared."""
        return self.comparison.layer_map

    @property
    def _comparable(self) -> bool:
        width = backbone(self.student).config.get_text_config().hidden_size
        return self.comparison.bridge is not None or width == self.teacher.width

    def _targets(self, batch: RolloutBatch, rows: RowsByTerm) -> Targets:
        """The teacher's states on its rows of the same text; for the anchor, the student's former ones.

        With an extrapolation the states of the representation term lie beyond the teacher's, and `REFERENCE`
        has the reference's final states.
        """
        comparison, norm = self.comparison, self.settings.final_norm
        requests = {}
        if REPRESENTATION in rows:
            mask = batch.on_teacher(rows[REPRESENTATION].mask)
            layers = comparison.layer_map.teacher_layers
            requests[REPRESENTATION] = StateRequest(layers, mask, norm, comparison.teacher)
        if OUTPUT in rows:
            mask = self.output.teacher_mask(batch, rows[OUTPUT].mask)
            requests[OUTPUT] = StateRequest((self.teacher.num_layers,), mask)
        targets: Targets = {}
        if requests:
            with self.stopwatch.part("teacher"):
                if self.extrapolation is not None:
                    targets = self._reference_states(batch, requests)
                states = self.teacher.read(batch.teacher, list(requests.values()), self.settings.padding_free)
            targets |= dict(zip(requests, states, strict=True))
        if REPRESENTATION in targets:
            targets[REPRESENTATION] = comparison.by_student_layer(targets[REPRESENTATION])
        if self.anchor is not None and ANCHOR in rows:
            request = StateRequest(comparison.layer_map.student_layers, rows[ANCHOR].mask, norm)
            targets[ANCHOR] = self.anchor.read(batch.student, request)
        return targets

    def _reference_states(self, batch: RolloutBatch, requests: dict[str, StateRequest]) -> Targets:
        """Turn `requests` to what lies beyond the teacher; returns the reference's final states, if read."""
        assert self.extrapolation is not None
        reference = self.extrapolation.read(batch.teacher, requests, self.settings.padding_free)
        if REPRESENTATION in requests:
            request = requests[REPRESENTATION]
            requests[REPRESENTATION] = self.extrapolation.onto(request, reference[REPRESENTATION])
        return {REFERENCE: reference[OUTPUT]} if OUTPUT in reference else {}

    def _losses(self, batch: RolloutBatch, rows: RowsByTerm, targets: Targets) -> dict[str, Tensor]:
        """The loss of each term: of states, the mean over layers; of the output, from final states."""
        device = batch.tokens.device
        at_layer = self._layer_losses(batch, rows, targets)
        made = self._student_forward(batch, rows, at_layer, backward_follows=OUTPUT not in rows)
        losses = {}
        for term in made:
            if term in at_layer:  # the forward has made a loss at every layer
                losses[term] = torch.stack([loss.to(device) for loss in made[term].values()]).mean()
            else:  # it has kept the final states, of which the output loss is made now
                losses[term] = self._output_loss(batch, rows[term], _last(made[term]), targets)
        return losses

    def _layer_losses(self, batch: RolloutBatch, rows: RowsByTerm, targets: Targets) -> dict[str, AtLayer]:
        """By term, the loss that the student's forward computes at each of its layers."""
        ids = batch.student.input_ids
        losses: dict[str, AtLayer] = {}
        if REPRESENTATION in rows:
            assert self.settings.representation_loss is not None
            loss = row_loss(self.settings.representation_loss, rows[REPRESENTATION].mask)
            if self.settings.row_weights == "gap":
                loss = by_gap(loss, rows[REPRESENTATION].rollouts)
            losses[REPRESENTATION] = RepresentationLoss(
                loss if self.extrapolation is None else self.extrapolation.scaled(loss),
                self.comparison,
                targets[REPRESENTATION],
                rows[REPRESENTATION],
                ids,
                self.averages,
                self.watch,
            )
        if ANCHOR in rows:
            assert self.anchor is not None
            paired = (batch.representation_weights > 0)[rows[ANCHOR].mask]
            losses[ANCHOR] = AnchorLoss(self.anchor, targets[ANCHOR], rows[ANCHOR], paired, ids, self.watch)
        return losses

    def _student_forward(
        self,
        batch: RolloutBatch,
        rows: RowsByTerm,
        at_layer: dict[str, AtLayer],
        *,
        backward_follows: bool = False,
    ) -> dict[str, dict[int, Tensor]]:
        """One forward of the student: by term and layer its states, or what `at_layer` makes of them."""
        layers, norm = self.layer_map.student_layers, self.settings.final_norm
        requests = {
            term: StateRequest((num_layers(self.student),), supervised.mask)
            if term == OUTPUT
            else StateRequest(layers, supervised.mask, norm, at_layer.get(term))
            for term, supervised in rows.items()
        }
        if not requests:
            return {}
        with attention_kept(self.student) if self.settings.keep_attention else nullcontext():
            states = read_states(
                self.student,
                batch.student,
                list(requests.values()),
                self.settings.padding_free,
                backward_follows=backward_follows,
            )
        return dict(zip(requests, states, strict=True))

    def _output_loss(
        self, batch: RolloutBatch, supervised: SupervisedRows, student: Tensor, targets: Targets
    ) -> Tensor:
        """Eq. 2-5 from final states."""
        teacher = _last(targets[OUTPUT])
        reference = _last(targets[REFERENCE]) if REFERENCE in targets else None
        loss, row_losses = self.output.loss(batch, supervised, student, teacher, self.averages, reference)
        self.watch.add("the output loss", None, row_losses, supervised.mask, batch.student.input_ids)
        return loss.to(batch.tokens.device)


def _last(states: States) -> Tensor:
    """The states of the one layer that an output term reads."""
    (last,) = states.values()
    return last
