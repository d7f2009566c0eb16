"""One update's loss on one micro-batch: teacher states, student states, Eq. 7, and what they show.

Knows models and tensors, not trainers: `Update` is what a trainer calls between rollout and backward.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd import output_space
from oprd.alignment import same_vocabulary
from oprd.anchor import Anchor
from oprd.batch import TERMS, Batch
from oprd.capture import backbone, num_layers
from oprd.comparison import Comparison, States
from oprd.diagnostics import add_output_statistics, add_representation_cosine
from oprd.errors import UserError
from oprd.freezing import freeze_unreached
from oprd.head import Head
from oprd.losses import REPRESENTATION_LOSSES
from oprd.meters import Averages, Stopwatch
from oprd.objective import output_loss, representation_loss
from oprd.reading import Want, read_states
from oprd.selection import LayerMap
from oprd.settings import ObjectiveSettings
from oprd.teacher import Teacher, shared_vocabulary

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
    vocabulary: int | None
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
        vocabulary = _vocabulary(settings, student, tokenizer, teacher)
        if vocabulary and settings.output_loss.startswith("top_k") and settings.output_top_k > vocabulary:
            k = settings.output_top_k
            raise UserError(f"output_top_k is {k}, but the vocabulary has {vocabulary} tokens: lower it")
        anchor = None
        if settings.anchor_schedule.ever_active and comparison.bridge is not None:
            anchor = Anchor.of(student, comparison.bridge, comparison.layer_map.student_layers)
        meters = Averages(), Stopwatch(device)
        update = cls(settings, comparison, student, teacher, vocabulary, anchor, *meters)
        if settings.output_schedule.ever_active:
            _ = update.heads
        elif student.get_output_embeddings().weight is student.get_input_embeddings().weight:
            logger.warning("the student's LM head is tied to its input embedding, so it moves along with it")
        if frozen := freeze_unreached(student, settings, comparison.layer_map):
            logger.info("frozen, since no loss reaches it: %s", ", ".join(frozen))
        return update

    @cached_property
    def heads(self) -> tuple[Head, Head]:
        """Both LM heads, made when logits are first wanted; raises `UserError` if one cannot be had."""
        assert self.vocabulary is not None
        return Head.of(self.student, self.vocabulary), Head.of(self.teacher.model, self.vocabulary)

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
        possible = {"representation": self._comparable, "output": self.vocabulary is not None}
        student, teacher = self._read(batch, [term for term in off if possible.get(term)])
        if "representation" in student:
            weights = batch.representation_weights[batch.representation_weights > 0]
            wanted = self.comparison.by_student_layer(teacher["representation"])
            add_representation_cosine(self.averages, student["representation"], wanted, weights)
        if "output" in student:
            self._observe_output(student["output"], teacher["output"])

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
                teacher_wants[term] = Want((self.teacher.num_layers,), batch.on_teacher(mask))
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
        (student_rows,), (teacher_rows,) = student.values(), teacher.values()
        mask = batch.output_weights > 0
        values = output_space.in_chunks(
            self._row_values, student_rows, teacher_rows, batch.tokens[mask], self.settings.output_chunk_size
        )
        value = output_loss(values, batch.output_weights[mask])
        if not torch.isfinite(value):
            raise NonFiniteLoss("the output loss is not finite, behind the last layer", _where(values, mask))
        self.averages.add("loss/output", value)
        self._observe_output(student, teacher)
        return value

    def _row_values(self, student_rows: Tensor, teacher_rows: Tensor, tokens: Tensor) -> Tensor:
        settings = self.settings
        student_head, teacher_head = self.heads
        student_logits = student_head(student_rows) / settings.student_temperature
        teacher_logits = teacher_head(teacher_rows).to(student_logits.device)
        teacher_logits = teacher_logits / settings.teacher_temperature
        if settings.output_loss == "sampled_token":
            return output_space.sampled_token(student_logits, teacher_logits, tokens)
        if settings.output_loss == "full_vocab":
            return output_space.full_vocab(student_logits, teacher_logits, settings.divergence)
        k, support = settings.output_top_k, settings.output_support
        if settings.output_loss == "top_k_authors":
            return output_space.top_k_authors(student_logits, teacher_logits, k, support)
        return output_space.top_k(student_logits, teacher_logits, k, support, settings.renormalize)

    def _observe_output(self, student: dict[int, Tensor], teacher: dict[int, Tensor]) -> None:
        (student_rows,), (teacher_rows,) = student.values(), teacher.values()
        add_output_statistics(self.averages, *self.heads, student_rows, teacher_rows)


def _vocabulary(
    settings: ObjectiveSettings,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
) -> int | None:
    """Size of the shared vocabulary; None where there is none and, with a bridge, none is needed."""
    other = teacher.tokenizer is not None and not same_vocabulary(tokenizer, teacher.tokenizer)
    if other and settings.bridge is not None and not settings.output_schedule.ever_active:
        return None
    return shared_vocabulary(student, tokenizer, teacher)


def _where(values: Tensor, mask: Tensor) -> list[int]:
    """The rollouts whose supervised rows have a value that is not finite."""
    return sorted(set(mask.nonzero()[:, 0][~torch.isfinite(values)].tolist()))
