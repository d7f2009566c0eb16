"""Output losses of rows by their name: each makes a value per row from both models' logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.objective import output_space
from oprd.objective.extrapolation import extrapolate
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.engines.importance import importance_weights

Logits = Float[Tensor, "N V"]


@dataclass(frozen=True)
class Sampled:
    """The student's own logits, the tokens that were sampled, and the engine's log-probs of these, if any."""

    logits: Logits
    tokens: Int[Tensor, " N"]
    engine: Float[Tensor, " N"] | None


@dataclass(frozen=True)
class Chunk:
    """Logits of both models over the tokens that are compared, divided by their temperatures.

    `tokens` are the sampled ones among these, and `sampled` as they were.
    """

    student: Logits
    teacher: Logits
    tokens: Int[Tensor, " N"]
    sampled: Sampled
    reference: Logits | None  # of the model that the teacher is extrapolated from

    @torch.no_grad()
    def rewards(self, settings: ObjectiveSettings) -> Logits:
        """log q of every token or, with a reference, what lies beyond it."""
        log_q = self.teacher.log_softmax(-1)
        if self.reference is None:
            return log_q
        return extrapolate(log_q, self.reference.log_softmax(-1), settings.teacher_extrapolation)


def _sampled_token(chunk: Chunk, settings: ObjectiveSettings) -> Float[Tensor, " N"]:
    log_q = chunk.rewards(settings)
    reward = log_q.gather(-1, chunk.tokens[:, None]).squeeze(-1)
    baseline = output_space.kl_baseline(chunk.student, log_q) if settings.output_baseline == "kl" else None
    del log_q  # as large as the logits
    values = output_space.sampled_reward(chunk.student, reward, chunk.tokens, baseline)
    sampled, cap = chunk.sampled, settings.vllm_importance_sampling_clip_max
    if sampled.engine is None or not settings.vllm_importance_sampling_correction:
        return values
    log_probs = output_space.log_probs(sampled.logits, sampled.tokens)
    return values * importance_weights(log_probs, sampled.engine, cap)


def _top_k(chunk: Chunk, settings: ObjectiveSettings) -> Float[Tensor, " N"]:
    k, support = settings.output_top_k, settings.output_support
    return output_space.top_k(chunk.student, chunk.teacher, k, support, settings.renormalize)


def _top_k_authors(chunk: Chunk, settings: ObjectiveSettings) -> Float[Tensor, " N"]:
    k, support = settings.output_top_k, settings.output_support
    return output_space.top_k_authors(chunk.student, chunk.teacher, k, support)


def _full_vocab(chunk: Chunk, settings: ObjectiveSettings) -> Float[Tensor, " N"]:
    # Of an extrapolated reward the divergence takes the distribution: the reverse KL's gradient is the same.
    teacher = chunk.teacher if chunk.reference is None else chunk.rewards(settings)
    return output_space.full_vocab(chunk.student, teacher, settings.divergence)


ROW_LOSSES: dict[str, Callable[[Chunk, ObjectiveSettings], Float[Tensor, " N"]]] = {
    "sampled_token": _sampled_token,
    "sampled_text": _sampled_token,  # every token is a span of text
    "top_k": _top_k,
    "top_k_authors": _top_k_authors,
    "full_vocab": _full_vocab,
}


def cooled(logits: Logits, temperature: float) -> Logits:
    """Logits divided by a temperature."""
    return logits if temperature == 1 else logits / temperature
