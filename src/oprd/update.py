"""One update's loss on one micro-batch: teacher states, student states, Eq. 7, and what they show.

Knows models and tensors, not trainers: `Update` is what a trainer calls between rollout and backward.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd import output_space
from oprd.alignment import same_vocabulary
from oprd.batch import Batch
from oprd.capture import backbone, blocks, num_layers
from oprd.comparison import Comparison, States
from oprd.diagnostics import add_output_statistics, add_representation_cosine
from oprd.errors import UserError
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
        update = cls(settings, comparison, student, teacher, vocabulary, Averages(), Stopwatch(device))
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
        """μ · representation + w · output (Eq. 7) of one micro-batch at update `step`, 0-based.

        A term of weight zero costs nothing, and a step without any changes nothing. Raises `NonFiniteLoss`.
        """
        representation = self.settings.representation_schedule(step)
        output = self.settings.output_schedule(step)
        student, teacher = self._read(batch, representation=representation > 0, output=output > 0)
        total = torch.zeros((), device=batch.tokens.device, requires_grad=True)
        if representation > 0:
            total = total + representation * self._representation(batch, student[0], teacher[0]).mean()
        if output > 0:
            total = total + output * self._output(batch, student[-1], teacher[-1])
        self.averages.add("loss/total", total)
        return total

    @torch.no_grad()
    def observe(self, batch: Batch, step: int) -> None:
        """Measure on `batch` what `loss` does not show at this step: cosines, entropies, top-k overlap."""
        representation = self.settings.representation_schedule(step) == 0 and self._comparable
        output = self.settings.output_schedule(step) == 0 and self.vocabulary is not None
        if not (representation or output):
            return
        student, teacher = self._read(batch, representation, output)
        if representation:
            weights = batch.representation_weights[batch.representation_weights > 0]
            wanted = self.comparison.by_student_layer(teacher[0])
            add_representation_cosine(self.averages, student[0], wanted, weights)
        if output:
            self._observe_output(student[-1], teacher[-1])

    @property
    def layer_map(self) -> LayerMap:
        """The pairs of layers that are compared."""
        return self.comparison.layer_map

    @property
    def _comparable(self) -> bool:
        width = backbone(self.student).config.get_text_config().hidden_size
        return self.comparison.bridge is not None or width == self.teacher.width

    def _read(
        self, batch: Batch, representation: bool, output: bool
    ) -> tuple[list[dict[int, Tensor]], list[dict[int, Tensor]]]:
        """Both models' states for the terms asked for: the representation's first, the output's last."""
        student_wants, teacher_wants = [], []
        if representation:
            mask, norm, here = batch.representation_weights > 0, self.settings.final_norm, self.comparison
            student_wants.append(Want(here.layer_map.student_layers, mask, norm, here.student))
            teacher_wants.append(
                Want(here.layer_map.teacher_layers, batch.on_teacher(mask), norm, here.teacher)
            )
        if output:
            mask = batch.output_weights > 0
            student_wants.append(Want((num_layers(self.student),), mask))
            teacher_wants.append(Want((self.teacher.num_layers,), batch.on_teacher(mask)))
        if not student_wants:
            return [], []
        with self.stopwatch.part("teacher"):
            teacher_states = self.teacher.read(batch.teacher, teacher_wants)
        return read_states(self.student, batch.student, student_wants), teacher_states

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
        children = list(backbone(student).children())
        for above in children[children.index(blocks(student)) + 1 :]:
            above.requires_grad_(False)
        frozen.append("the final norm")
    return frozen
