"""The output loss: both LM heads on final states, and a divergence of their next-token distributions."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from oprd.foundation.errors import UserError
from oprd.foundation.meters import Averages
from oprd.models.lm_head import Head, ToLogits
from oprd.models.teacher import Teacher, shared_vocabulary
from oprd.objective import output_space
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.engines.importance import importance_weights
from oprd.rollouts.rows import RolloutBatch, SupervisedRows
from oprd.text.alignment import same_vocabulary
from oprd.training.diagnostics import add_log_prob_gap, add_output_statistics
from oprd.training.training_pair import TrainingPair

DESCRIBED_ROWS = 32
Rows = Float[Tensor, "N D"]
Logits = Float[Tensor, "N V"]


@dataclass(frozen=True)
class OutputTerm:
    """An output loss, bound to two models; without a shared vocabulary it compares spans of text."""

    settings: ObjectiveSettings
    student: PreTrainedModel
    teacher: Teacher
    vocabulary: int | None
    heads: tuple[Head, Head] | None  # the student's and the teacher's, if the run makes logits

    @classmethod
    def bind(cls, settings: ObjectiveSettings, pair: TrainingPair) -> "OutputTerm":
        """Compare vocabularies, and make the heads if the run uses them; raises `UserError`."""
        student, teacher = pair.student, pair.teacher
        vocabulary = _vocabulary(settings, pair)
        if vocabulary and settings.output_loss.startswith("top_k") and settings.output_top_k > vocabulary:
            k = settings.output_top_k
            raise UserError(f"output_top_k is {k}, but the vocabulary has {vocabulary} tokens: lower it")
        heads = None
        if settings.output_schedule.ever_active or (vocabulary and settings.diagnostics_steps):
            ours, theirs = (
                Head.of(model, vocabulary or model.config.get_text_config().vocab_size)
                for model in (student, teacher.model)
            )  # while no weights are sharded
            heads = ours, theirs
        return cls(settings, student, teacher, vocabulary, heads)

    @property
    def _heads(self) -> tuple[Head, Head]:
        assert self.heads is not None
        return self.heads

    def teacher_mask(self, batch: RolloutBatch, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T2"]:
        """The teacher's rows that the student's rows of `mask` are compared with."""
        return mask if self.vocabulary else batch.spans(mask).teacher_mask

    def loss(
        self, batch: RolloutBatch, here: SupervisedRows, student: Rows, teacher: Rows, averages: Averages
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """Σ_rows weight · value (Eq. 2–5) and the values, from the final states of the supervised rows.

        No gradient passes through the values. Entropies and overlap of some rows go to `averages`.
        """
        ours, theirs = self._heads
        with ours.gathered(), theirs.gathered():
            return self._loss(batch, here, student, teacher, averages)

    def _loss(
        self, batch: RolloutBatch, here: SupervisedRows, student: Rows, teacher: Rows, averages: Averages
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        mask, weights, size = here.mask, here.weights, self.settings.output_chunk_size
        tokens = batch.tokens[mask]
        ours, theirs = self._heads
        if self.vocabulary:
            teacher, teacher_logits = theirs.prepared(teacher)
            per_row = partial(self._row_values, averages, _stride(len(tokens)), teacher_logits)
            others = (teacher, tokens, *self._engine_log_probs(batch, mask))
            return ours.weighted_loss(per_row, student, others, weights, size)
        spans = batch.spans(mask)
        assert batch.teacher_tokens is not None
        written = batch.teacher_tokens[spans.teacher_mask].to(teacher.device)
        log_p = ours.in_chunks(self._student_log_probs, student, (tokens,), size).requires_grad_()
        log_q = theirs.in_chunks(self._teacher_log_probs, teacher, (written,), size)
        with torch.enable_grad():
            values = output_space.sampled_text(log_p, log_q, spans.student, spans.teacher)
            total = (values * weights.to(values)).sum()
        (slopes,) = torch.autograd.grad(total, log_p)
        carrier, _ = ours.weighted_loss(self._student_log_probs, student, (tokens,), slopes, size)
        return total.detach() + carrier - carrier.detach(), values.detach()

    def observe(self, averages: Averages, student: Rows, teacher: Rows) -> None:
        """Add entropies and overlap of evenly spaced rows, where both models speak of the same tokens."""
        stride, (ours, theirs) = _stride(len(student)), self._heads
        with ours.gathered(), theirs.gathered():
            logits = ours(student[::stride])
            add_output_statistics(averages, logits, theirs(teacher[::stride]).to(logits.device))

    def _student_log_probs(self, logits: Logits, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        return output_space.log_probs(_cooled(logits, self.settings.student_temperature), tokens)

    def _teacher_log_probs(self, logits: Logits, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        return output_space.log_probs(_cooled(logits, self.settings.teacher_temperature), tokens)

    def _engine_log_probs(
        self, batch: RolloutBatch, mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, " N"], ...]:
        """The engine's log-probs of the sampled tokens, if it gave any."""
        if batch.engine_log_probs is not None:
            return (batch.engine_log_probs[mask],)
        if self.settings.vllm_importance_sampling_correction:
            raise UserError(
                "these rollouts have no engine log-probs, which importance weights need (with tools "
                "none are kept): set vllm_importance_sampling_correction: false"
            )
        return ()

    def _row_values(
        self,
        averages: Averages,
        stride: int,
        to_teacher_logits: ToLogits,
        logits: Logits,
        teacher: Rows,
        tokens: Int[Tensor, " N"],
        engine: Float[Tensor, " N"] | None = None,
    ) -> Float[Tensor, " N"]:
        settings = self.settings
        with torch.no_grad():
            teacher_logits = to_teacher_logits(teacher).to(logits.device)
            add_output_statistics(averages, logits[::stride], teacher_logits[::stride])
            if engine is not None:
                add_log_prob_gap(averages, logits[::stride], tokens[::stride], engine[::stride])
        student_logits = _cooled(logits, settings.student_temperature)
        teacher_logits = _cooled(teacher_logits, settings.teacher_temperature)
        if settings.output_loss in ("sampled_token", "sampled_text"):  # every token is a span of text
            values = output_space.sampled_token(student_logits, teacher_logits, tokens)
            if engine is None or not settings.vllm_importance_sampling_correction:
                return values
            cap = settings.vllm_importance_sampling_clip_max
            return values * importance_weights(output_space.log_probs(logits, tokens), engine, cap)
        if settings.output_loss == "full_vocab":
            return output_space.full_vocab(student_logits, teacher_logits, settings.divergence)
        k, support = settings.output_top_k, settings.output_support
        if settings.output_loss == "top_k_authors":
            return output_space.top_k_authors(student_logits, teacher_logits, k, support)
        return output_space.top_k(student_logits, teacher_logits, k, support, settings.renormalize)


def _cooled(logits: Logits, temperature: float) -> Logits:
    return logits if temperature == 1 else logits / temperature


def _stride(rows: int) -> int:
    """The step between rows that are described, so that about `DESCRIBED_ROWS` are."""
    return max(1, rows // DESCRIBED_ROWS)


def _vocabulary(settings: ObjectiveSettings, pair: TrainingPair) -> int | None:
    """Size of the shared vocabulary; None where there is none and the recipe needs none."""
    theirs = pair.teacher.tokenizer
    if theirs is not None and not same_vocabulary(pair.tokenizer, theirs):
        direct = settings.representation_schedule.ever_active and settings.bridge is None
        over_text = settings.output_loss == "sampled_text" and settings.teacher_tokenization == "own"
        if not direct and (over_text or not settings.output_schedule.ever_active):
            return None
    return shared_vocabulary(pair.student, pair.tokenizer, pair.teacher)
