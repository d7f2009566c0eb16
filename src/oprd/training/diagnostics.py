"""Metrics besides the loss: similarity of hidden states and of next-token distributions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.foundation.meters import Averages
from oprd.objective.losses import cosine
from oprd.objective.output_space import entropy, log_probs, top_k_overlap
from oprd.text.shared_tokens import SharedTokens


@torch.no_grad()
def add_representation_cosine(
    averages: Averages,
    layer: int,
    student: Float[Tensor, "N D"],
    teacher: Float[Tensor, "N D"],
    weights: Float[Tensor, " N"],
) -> None:
    """Add the weighted mean cosine of student and teacher rows, of a student layer and over layers."""
    value = ((1 - cosine(student, teacher)) * weights.to(student.device)).sum()
    for name in (f"representation/cosine_layer_{layer}", "representation/cosine"):
        averages.add(name, value, weights.sum())


@torch.no_grad()
def add_output_statistics(
    averages: Averages,
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N V"],
    overlap_k: int = 16,
) -> None:
    """Add both models' entropies (nats) and their top-k overlap."""
    rows = len(student_logits)
    averages.add("output/student_entropy", entropy(student_logits).sum(), rows)
    averages.add("output/teacher_entropy", entropy(teacher_logits).sum(), rows)
    averages.add("output/top_k_overlap", top_k_overlap(student_logits, teacher_logits, overlap_k).sum(), rows)


@torch.no_grad()
def add_shared_mass(
    averages: Averages,
    shared: SharedTokens,
    student_logits: Float[Tensor, "N V"],
    teacher_logits: Float[Tensor, "N W"],
) -> None:
    """Add the mean probability that each model gives to the tokens of both vocabularies."""
    sides = ("student", shared.student, student_logits), ("teacher", shared.teacher, teacher_logits)
    for name, side, logits in sides:
        mass = (side.logits(logits).logsumexp(-1) - logits.logsumexp(-1)).exp()
        averages.add(f"output/{name}_shared_mass", mass.sum(), len(mass))


@torch.no_grad()
def add_log_prob_gap(
    averages: Averages,
    student_logits: Float[Tensor, "N V"],
    tokens: Int[Tensor, " N"],
    engine_log_probs: Float[Tensor, " N"],
) -> None:
    """Add the mean |log π_trainer − log π_engine| (nats) of tokens that a generation engine sampled."""
    gaps = (log_probs(student_logits, tokens) - engine_log_probs).abs()
    averages.add("rollout/logprob_gap", gaps.sum(), len(gaps))
