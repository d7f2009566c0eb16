"""What training logs besides the loss: how alike states and next-token distributions are."""

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.head import Head
from oprd.losses import cosine
from oprd.meters import Averages
from oprd.output_space import entropy, top_k_overlap


@torch.no_grad()
def add_representation_cosine(
    averages: Averages,
    student: dict[int, Float[Tensor, "N D"]],
    teacher: dict[int, Float[Tensor, "N D"]],
    weights: Float[Tensor, " N"],
) -> None:
    """Add the weighted mean cosine of student and teacher rows of each student layer, and over layers."""
    total = weights.sum()
    for layer, rows in student.items():
        value = ((1 - cosine(rows, teacher[layer])) * weights.to(rows.device)).sum()
        averages.add(f"representation/cosine_layer_{layer}", value, total)
        averages.add("representation/cosine", value, total)


@torch.no_grad()
def add_output_statistics(
    averages: Averages,
    student_head: Head,
    teacher_head: Head,
    student: Float[Tensor, "N D_S"],
    teacher: Float[Tensor, "N D_T"],
    overlap_k: int = 16,
    sample: int = 256,
) -> None:
    """Add both models' entropies (nats) and their top-k overlap on at most `sample` evenly spaced rows."""
    chosen = torch.linspace(0, max(len(student) - 1, 0), min(sample, len(student))).long()
    student_logits = student_head(student[chosen.to(student.device)])
    teacher_logits = teacher_head(teacher[chosen.to(teacher.device)]).to(student_logits.device)
    averages.add("output/student_entropy", entropy(student_logits).sum(), len(chosen))
    averages.add("output/teacher_entropy", entropy(teacher_logits).sum(), len(chosen))
    averages.add(
        "output/top_k_overlap", top_k_overlap(student_logits, teacher_logits, overlap_k).sum(), len(chosen)
    )
