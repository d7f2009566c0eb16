"""The output loss: both LM heads on final states, and a divergence of their next-token distributions."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from oprd.foundation.errors import UserError
from oprd.foundation.meters import Averages
from oprd.models.eos import eos_token_ids
from oprd.models.lm_head import Head
from oprd.models.teacher import Teacher, shared_vocabulary
from oprd.objective import output_space
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.rows import RolloutBatch, SupervisedRows
from oprd.text.alignment import same_vocabulary
from oprd.text.shared_tokens import SharedTokens, Speller
from oprd.training.diagnostics import add_log_prob_gap, add_output_statistics, add_shared_mass
from oprd.training.extrapolation import Extrapolation
from oprd.training.row_losses import ROW_LOSSES, Chunk, Sampled, cooled
from oprd.training.training_pair import TrainingPair

DESCRIBED_ROWS = 32
OVER_SHARED_TOKENS = ("top_k", "full_vocab")  # what can be compared across two vocabularies
Rows = Float[Tensor, "N D"]
Logits = Float[Tensor, "N V"]


@dataclass(frozen=True)
class OutputTerm:
    """An output loss, bound to two models.

    Without one vocabulary it compares the tokens that both spell alike, or spans of text.
    """

    settings: ObjectiveSettings
    student: PreTrainedModel
    teacher: Teacher
    vocabulary: int | None
    heads: tuple[Head, Head] | None  # the student's and the teacher's, if the run makes logits
    reference: Head | None = None  # that of the model which rewards are extrapolated from
    shared: SharedTokens | None = None  # across vocabularies, the tokens that logits are compared over

    @classmethod
    def bind(
        cls, settings: ObjectiveSettings, pair: TrainingPair, extrapolation: Extrapolation | None = None
    ) -> "OutputTerm":
        """Compare vocabularies, and make the heads if the run uses them; raises `UserError`."""
        student, teacher = pair.student, pair.teacher
        vocabulary = _vocabulary(settings, pair)
        needs_logits = settings.output_schedule.ever_active or settings.row_weights == "importance"
        shared = _shared_tokens(settings, pair, vocabulary) if needs_logits else None
        _check(settings, vocabulary, shared)
        heads, reference = None, None
        if needs_logits or (vocabulary and settings.diagnostics_steps):
            ours, theirs = (
                Head.of(model, vocabulary or model.config.get_text_config().vocab_size)
                for model in (student, teacher.model)
            )  # while no weights are sharded
            heads = ours, theirs
        if extrapolation is not None and settings.output_schedule.ever_active:
            assert vocabulary is not None
            reference = extrapolation.head(vocabulary)
        return cls(settings, student, teacher, vocabulary, heads, reference, shared)

    @property
    def _heads(self) -> tuple[Head, Head]:
        assert self.heads is not None
        return self.heads

    def teacher_mask(self, batch: RolloutBatch, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T2"]:
        """The teacher's rows that the student's rows of `mask` are compared with."""
        if self.shared:
            return batch.on_teacher(mask)
        return mask if self.vocabulary else batch.spans(mask).teacher_mask

    def loss(
        self,
        batch: RolloutBatch,
        supervised: SupervisedRows,
        student: Rows,
        teacher: Rows,
        averages: Averages,
        reference: Rows | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """Σ_rows weight · value (Eq. 2–5) and the values, from the final states of the supervised rows.

        No gradient passes through the values. Entropies and overlap of some rows go to `averages`.
        """
        ours, theirs = self._heads
        base = nullcontext() if self.reference is None else self.reference.gathered()
        with ours.gathered(), theirs.gathered(), base:
            if self.vocabulary or self.shared:
                return self._token_loss(batch, supervised, student, teacher, averages, reference)
            return self._span_loss(batch, supervised, student, teacher)

    def _token_loss(
        self,
        batch: RolloutBatch,
        supervised: SupervisedRows,
        student: Rows,
        teacher: Rows,
        averages: Averages,
        reference: Rows | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """`loss` over one vocabulary, or the shared tokens of two: every row by itself, in chunks."""
        ours, theirs = self._heads
        tokens = batch.tokens[supervised.mask]
        teacher, to_teacher_logits = theirs.prepared(teacher)
        row_loss = ROW_LOSSES[self.settings.output_loss]
        described = slice(None, None, _stride(len(tokens)))
        others = {"teacher": teacher, "tokens": tokens}
        if (engine := self._engine_log_probs(batch, supervised.mask)) is not None:
            others["engine"] = engine
        if reference is not None:
            assert self.reference is not None
            others["reference"], to_reference_logits = self.reference.prepared(reference)

        def row_values(logits: Logits, *parts: Tensor) -> Float[Tensor, " n"]:
            given = dict(zip(others, parts, strict=True))
            tokens, engine, base = given["tokens"], given.get("engine"), None
            with torch.no_grad():
                teacher_logits = to_teacher_logits(given["teacher"]).to(logits.device)
            if engine is not None:
                add_log_prob_gap(averages, logits[described], tokens[described], engine[described])
            sampled = Sampled(logits, tokens, engine)
            if self.shared is not None:
                if self.vocabulary is None:
                    add_shared_mass(averages, self.shared, logits[described], teacher_logits[described])
                logits, teacher_logits = self.shared.logits(logits, teacher_logits)
                tokens = self.shared.student.tokens(tokens)
            add_output_statistics(averages, logits[described], teacher_logits[described])
            if "reference" in given:
                with torch.no_grad():
                    base = to_reference_logits(given["reference"]).to(logits.device)
                    base = base if self.shared is None else self.shared.teacher.logits(base)
                    base = self._teacher_cooled(base)
            student_logits = cooled(logits, self.settings.student_temperature)
            chunk = Chunk(student_logits, self._teacher_cooled(teacher_logits), tokens, sampled, base)
            return row_loss(chunk, self.settings)

        size = self.settings.output_chunk_size
        return ours.weighted_loss(row_values, student, list(others.values()), supervised.weights, size)

    def _span_loss(
        self, batch: RolloutBatch, supervised: SupervisedRows, student: Rows, teacher: Rows
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """`loss` across vocabularies: log-probs of all rows first, for a row's value is that of its span."""
        ours, theirs = self._heads
        tokens, size = batch.tokens[supervised.mask], self.settings.output_chunk_size
        spans = batch.spans(supervised.mask)
        assert batch.teacher_tokens is not None
        written = batch.teacher_tokens[spans.teacher_mask].to(teacher.device)
        log_p = ours.in_chunks(self._student_log_probs, student, (tokens,), size).requires_grad_()
        log_q = theirs.in_chunks(self._teacher_log_probs, teacher, (written,), size)
        with torch.enable_grad():
            values = output_space.sampled_text(log_p, log_q, spans.student, spans.teacher)
            total = (values * supervised.weights.to(values)).sum()
        # Slopes are constants, so `carrier` = Σ slopes · log p has the gradient of `total` in the student.
        # Less itself it adds nothing to the value: what is returned has total's value, carrier's gradient.
        (slopes,) = torch.autograd.grad(total, log_p)
        carrier, _ = ours.weighted_loss(self._student_log_probs, student, (tokens,), slopes, size)
        return total.detach() + carrier - carrier.detach(), values.detach()

    def advantages(
        self, batch: RolloutBatch, mask: Bool[Tensor, "B T"], student: Rows, teacher: Rows
    ) -> Float[Tensor, " N"]:
        """log p − log q of the sampled tokens at rows of one vocabulary, from final states."""
        tokens, size, (ours, theirs) = batch.tokens[mask], self.settings.output_chunk_size, self._heads
        with ours.gathered(), theirs.gathered():
            log_p = ours.in_chunks(self._student_log_probs, student, (tokens,), size)
            log_q = theirs.in_chunks(self._teacher_log_probs, teacher, (tokens.to(teacher.device),), size)
        return log_p - log_q.to(log_p)

    def observe(self, averages: Averages, student: Rows, teacher: Rows) -> None:
        """Add entropies and overlap of evenly spaced rows, where both models speak of the same tokens."""
        stride, (ours, theirs) = _stride(len(student)), self._heads
        with ours.gathered(), theirs.gathered():
            logits = ours(student[::stride])
            add_output_statistics(averages, logits, theirs(teacher[::stride]).to(logits.device))

    def _teacher_cooled(self, logits: Logits) -> Logits:
        return cooled(logits, self.settings.teacher_temperature)

    def _student_log_probs(self, logits: Logits, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        if self.shared is not None:
            logits, tokens = self.shared.student.logits(logits), self.shared.student.tokens(tokens)
        return output_space.log_probs(cooled(logits, self.settings.student_temperature), tokens)

    def _teacher_log_probs(self, logits: Logits, tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        if self.shared is not None:
            logits, tokens = self.shared.teacher.logits(logits), self.shared.teacher.tokens(tokens)
        return output_space.log_probs(self._teacher_cooled(logits), tokens)

    def _engine_log_probs(self, batch: RolloutBatch, mask: Bool[Tensor, "B T"]) -> Float[Tensor, " N"] | None:
        """The engine's log-probs of the sampled tokens, if it gave any."""
        if batch.engine_log_probs is not None:
            return batch.engine_log_probs[mask]
        if self.settings.vllm_importance_sampling_correction:
            raise UserError(
                "these rollouts have no engine log-probs, which importance weights need (with tools "
                "none are kept): set vllm_importance_sampling_correction: false"
            )
        return None


def _stride(rows: int) -> int:
    """The step between rows that are described, so that about `DESCRIBED_ROWS` are."""
    return max(1, rows // DESCRIBED_ROWS)


def _check(settings: ObjectiveSettings, vocabulary: int | None, shared: SharedTokens | None) -> None:
    """Raise `UserError` for a loss or weights that the tokens of both models do not allow."""
    size, k = vocabulary or (shared and shared.size), settings.output_top_k
    if size and settings.output_loss.startswith("top_k") and k > size:
        what = "the vocabulary has" if vocabulary else "both vocabularies share"
        raise UserError(f"output_top_k is {k}, but {what} {size} tokens: lower it")
    if vocabulary is None and settings.row_weights == "importance":
        raise UserError(
            "row_weights: importance compares the probabilities of sampled tokens, and the teacher has "
            "another tokenizer: leave it out"
        )


def _shared_tokens(
    settings: ObjectiveSettings, pair: TrainingPair, vocabulary: int | None
) -> SharedTokens | None:
    """The tokens that are compared, unless they are one vocabulary: those of both, all ends as one."""
    teacher = pair.teacher
    if vocabulary is not None:
        return SharedTokens.with_one_end(vocabulary, pair.ends).to(pair.device) if pair.ends else None
    if settings.output_loss not in OVER_SHARED_TOKENS:
        return None
    assert teacher.tokenizer is not None
    models = (pair.student, pair.tokenizer), (teacher.model, teacher.tokenizer)
    ours, theirs = (
        Speller(tokenizer, eos_token_ids(model, tokenizer), model.config.get_text_config().vocab_size)
        for model, tokenizer in models
    )
    return SharedTokens.of(ours, theirs).to(pair.device)


def _vocabulary(settings: ObjectiveSettings, pair: TrainingPair) -> int | None:
    """Size of the shared vocabulary; None where there is none and the recipe needs none."""
    theirs = pair.teacher.tokenizer
    if theirs is not None and not same_vocabulary(pair.tokenizer, theirs):
        direct = settings.representation_schedule.ever_active and settings.bridge is None
        across = settings.output_loss in ("sampled_text", *OVER_SHARED_TOKENS)
        over_text = across and settings.teacher_tokenization == "own"
        if not direct and (over_text or not settings.output_schedule.ever_active):
            return None
    return shared_vocabulary(pair.student, pair.tokenizer, pair.teacher)
