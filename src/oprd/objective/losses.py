"""Representation losses: student rows against teacher rows, one value per row, nothing reduced.

Every loss takes `student[N, D]` and `teacher[N, D]`, computes in float32 or wider, lets no gradient
reach the teacher (the stop-gradient of Eq. 6), and is exactly zero, gradient included, on equal rows.
A row of zero norm counts as having norm one where a norm divides.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from oprd.foundation.errors import UserError

RowLoss = Callable[[Float[Tensor, "N D"], Float[Tensor, "N D"]], Float[Tensor, " N"]]


def mse(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """(1/D) ‖s − t‖², the row term of Eq. 6."""
    student, teacher = checked_rows(student, teacher)
    return (student - teacher).square().mean(-1)


def normalized_mse(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """‖s/‖s‖ − t/‖t‖‖², the row term of Eq. 14 on L2-normalised vectors; in [0, 4]."""
    student, teacher = checked_rows(student, teacher)
    return (unit(student) - unit(teacher)).square().sum(-1)


def cosine(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """1 − cos(s, t), computed as ½ ‖s/‖s‖ − t/‖t‖‖², which is exactly zero on equal rows."""
    return normalized_mse(student, teacher) / 2


def relative_mse(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """‖s − t‖² / ‖t‖²: scale-free, so late layers and outlier rows do not dominate the sum."""
    student, teacher = checked_rows(student, teacher)
    return (student - teacher).square().sum(-1) / _norm(teacher).squeeze(-1).square()


def smooth_l1(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """Mean over D of the Huber loss with threshold 1."""
    student, teacher = checked_rows(student, teacher)
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(-1)


REPRESENTATION_LOSSES: dict[str, RowLoss] = {
    "mse": mse,
    "normalized_mse": normalized_mse,
    "cosine": cosine,
    "relative_mse": relative_mse,
    "smooth_l1": smooth_l1,
}


def checked_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the teacher's without gradient; raises `UserError` for unlike shapes."""
    if student.ndim != 2 or student.shape != teacher.shape:
        raise UserError(
            f"student rows {tuple(student.shape)} and teacher rows {tuple(teacher.shape)} must have "
            "the same shape [rows, width]; models of different width need a bridge"
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(student.device, dtype)


def _norm(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1)


def unit(rows: Tensor) -> Tensor:
    """Rows of length one; one of length zero stays."""
    return rows / _norm(rows)
