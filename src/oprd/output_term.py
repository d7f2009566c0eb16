"""The output term of an update: both LM heads on final states, and a divergence of what they say."""

from dataclasses import dataclass
from functools import cached_property, partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd import output_space
from oprd.alignment import same_vocabulary
from oprd.batch import Batch
from oprd.diagnostics import add_output_statistics
from oprd.errors import UserError
from oprd.head import Head
from oprd.meters import Averages
from oprd.settings import ObjectiveSettings
from oprd.teacher import Teacher, shared_vocabulary

Rows = Float[Tensor, "N D"]


@dataclass(frozen=True)
class OutputTerm:
    """An output loss, bound to two models; without a shared vocabulary it compares spans of text."""

    settings: ObjectiveSettings
    student: PreTrainedModel
    teacher: Teacher
    vocabulary: int | None

    @classmethod
    def bind(
        cls,
        settings: ObjectiveSettings,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
    ) -> "OutputTerm":
        """Compare vocabularies, and make the heads if the run uses them; raises `UserError`."""
        vocabulary = _vocabulary(settings, student, tokenizer, teacher)
        if vocabulary and settings.output_loss.startswith("top_k") and settings.output_top_k > vocabulary:
            k = settings.output_top_k
            raise UserError(f"output_top_k is {k}, but the vocabulary has {vocabulary} tokens: lower it")
        term = cls(settings, student, teacher, vocabulary)
        if settings.output_schedule.ever_active:
            _ = term.heads
        return term

    @cached_property
    def heads(self) -> tuple[Head, Head]:
        """Both LM heads, made when logits are first wanted; raises `UserError` if one cannot be had."""
        ours, theirs = self.student, self.teacher.model
        return Head.of(ours, self.vocabulary or _size(ours)), Head.of(
            theirs, self.vocabulary or _size(theirs)
        )

    def teacher_mask(self, batch: Batch, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T2"]:
        """The teacher's rows that the student's rows of `mask` are compared with."""
        return mask if self.vocabulary else batch.spans(mask).teacher_mask

    def values(self, batch: Batch, student: Rows, teacher: Rows) -> Float[Tensor, " N"]:
        """The loss of every supervised row, from the states of these rows and of the teacher's."""
        mask, size = batch.output_weights > 0, self.settings.output_chunk_size
        tokens = batch.tokens[mask]
        if self.vocabulary:
            return output_space.in_chunks(self._row_values, (student, teacher, tokens), size)
        spans = batch.spans(mask)
        assert batch.teacher_tokens is not None
        student_log_probs, teacher_log_probs = (partial(self._log_probs, side) for side in (0, 1))
        log_p = output_space.in_chunks(student_log_probs, (student, tokens), size)
        with torch.no_grad():
            theirs = batch.teacher_tokens[spans.teacher_mask].to(teacher.device)
            log_q = output_space.in_chunks(teacher_log_probs, (teacher, theirs), size)
        return output_space.sampled_text(log_p, log_q, spans.student, spans.teacher)

    def observe(self, averages: Averages, student: Rows, teacher: Rows) -> None:
        """Add entropies and overlap, where both models speak of the same tokens."""
        if self.vocabulary:
            add_output_statistics(averages, *self.heads, student, teacher)

    def _logits(self, side: int, rows: Rows) -> Float[Tensor, "N V"]:
        temperature = (self.settings.student_temperature, self.settings.teacher_temperature)[side]
        return self.heads[side](rows) / temperature

    def _log_probs(self, side: int, rows: Rows, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        return output_space.log_probs(self._logits(side, rows), tokens)

    def _row_values(self, student: Rows, teacher: Rows, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        settings = self.settings
        student_logits = self._logits(0, student)
        teacher_logits = self._logits(1, teacher).to(student_logits.device)
        if settings.output_loss in ("sampled_token", "sampled_text"):  # every token is a span of text
            return output_space.sampled_token(student_logits, teacher_logits, tokens)
        if settings.output_loss == "full_vocab":
            return output_space.full_vocab(student_logits, teacher_logits, settings.divergence)
        k, support = settings.output_top_k, settings.output_support
        if settings.output_loss == "top_k_authors":
            return output_space.top_k_authors(student_logits, teacher_logits, k, support)
        return output_space.top_k(student_logits, teacher_logits, k, support, settings.renormalize)


def _size(model: PreTrainedModel) -> int:
    return model.config.get_text_config().vocab_size


def _vocabulary(
    settings: ObjectiveSettings,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: Teacher,
) -> int | None:
    """Size of the shared vocabulary; None where there is none and the recipe needs none."""
    if teacher.tokenizer is not None and not same_vocabulary(tokenizer, teacher.tokenizer):
        direct = settings.representation_schedule.ever_active and settings.bridge is None
        over_text = settings.output_loss == "sampled_text" and settings.teacher_tokenization == "own"
        if not direct and (over_text or not settings.output_schedule.ever_active):
            return None
    return shared_vocabulary(student, tokenizer, teacher)
