"""The fit as linear algebra on second moments: teacher directions, least squares, what it predicts, rank.

Everything is float64 and pure. `Joint` holds the moments of one pair of layers; n rows, widths d_S, d_T.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

ILL_CONDITIONED = 1e-12  # smallest pivot of the unit-diagonal Gram matrix that needs no ridge
RIDGE = 1e-9  # of the unit diagonal
CONSTANT = 1e-24  # variance over squared mean, below which a dimension is constant but for rounding


@dataclass(frozen=True)
class Joint:
    """Means and centred sums of products of the rows of a student and a teacher layer."""

    count: int
    student_mean: Float[Tensor, " S"]
    teacher_mean: Float[Tensor, " T"]
    student: Float[Tensor, "S S"]
    teacher: Float[Tensor, "T T"]
    cross: Float[Tensor, "S T"]

    @classmethod
    def empty(cls, student_width: int, teacher_width: int) -> "Joint":
        """No rows."""
        means = [torch.zeros(width, dtype=torch.float64) for width in (student_width, teacher_width)]
        products = [torch.outer(means[a], means[b]) for a, b in ((0, 0), (1, 1), (0, 1))]
        return cls(0, *means, *products)

    def __add__(self, other: "Joint") -> "Joint":
        """The moments of both sets of rows."""
        if not (self.count and other.count):
            return self if self.count else other
        total = self.count + other.count
        student, teacher = other.student_mean - self.student_mean, other.teacher_mean - self.teacher_mean
        weight = self.count * other.count / total
        return Joint(
            total,
            self.student_mean + student * (other.count / total),
            self.teacher_mean + teacher * (other.count / total),
            self.student + other.student + weight * torch.outer(student, student),
            self.teacher + other.teacher + weight * torch.outer(teacher, teacher),
            self.cross + other.cross + weight * torch.outer(student, teacher),
        )

    def without_rounding(self) -> "Joint":
        """The same moments with exact zeros for dimensions that never vary, where sums leave a rounding."""
        student, teacher = (
            scatter.diagonal() > CONSTANT * self.count * mean.square()
            for scatter, mean in ((self.student, self.student_mean), (self.teacher, self.teacher_mean))
        )
        varying = self.scaled(student, teacher)
        return replace(varying, student_mean=self.student_mean, teacher_mean=self.teacher_mean)

    def scaled(self, student: Float[Tensor, " S"], teacher: Float[Tensor, " T"]) -> "Joint":
        """The moments of the rows after multiplying every dimension by its scale."""
        return Joint(
            self.count,
            self.student_mean * student,
            self.teacher_mean * teacher,
            self.student * student[:, None] * student,
            self.teacher * teacher[:, None] * teacher,
            self.cross * student[:, None] * teacher,
        )


@dataclass(frozen=True)
class Target:
    """What the student's projection has to predict: directions · (h_T − mean)."""

    directions: Float[Tensor, "R T"]
    mean: Float[Tensor, " T"]


@dataclass(frozen=True)
class Predictor:
    """P_S h_S + offset."""

    matrix: Float[Tensor, "R S"]
    offset: Float[Tensor, " R"]

    def first(self, rank: int) -> "Predictor":
        """The predictor of the first directions."""
        return Predictor(self.matrix[:rank], self.offset[:rank])


def inverse_deviations(scatter: Float[Tensor, "D D"], count: int) -> Float[Tensor, " D"]:
    """1/σ of every dimension; 1 where it never varies."""
    variance = scatter.diagonal() / max(count - 1, 1)
    return torch.where(variance > 0, variance, 1).rsqrt()


def principal_directions(joint: Joint) -> Float[Tensor, "T T"]:
    """Eigenvectors of the teacher's sample covariance as rows, by falling eigenvalue (Eq. 12)."""
    return _eigenvectors(joint.teacher)


def shared_directions(joint: Joint) -> Float[Tensor, "T T"]:
    """Reduced-rank regression: eigenvectors of the part of the teacher's covariance the student explains."""
    return _eigenvectors(joint.cross.T @ _solve(joint.student, joint.cross))


def least_squares(joint: Joint, target: Target, affine: bool) -> Predictor:
    """The exact minimiser of Σ ‖P_S h_S + b − P_T(h_T − μ_T)‖² (Eq. 13), with b = 0 unless `affine`."""
    wanted_mean = target.directions @ (joint.teacher_mean - target.mean)
    cross = joint.cross @ target.directions.T
    if affine:
        matrix = _solve(joint.student, cross).T
        return Predictor(matrix, wanted_mean - matrix @ joint.student_mean)
    gram = joint.student + joint.count * torch.outer(joint.student_mean, joint.student_mean)
    cross = cross + joint.count * torch.outer(joint.student_mean, wanted_mean)
    return Predictor(_solve(gram, cross).T, torch.zeros_like(wanted_mean))


def direction_errors(
    joint: Joint, predictor: Predictor, target: Target
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Per direction, over the rows of `joint`: the mean squared error and the mean square of the target."""
    p, q, n = predictor.matrix, target.directions, joint.count
    wanted_mean = q @ (joint.teacher_mean - target.mean)
    bias = p @ joint.student_mean + predictor.offset - wanted_mean
    wanted = _quadratic(q, joint.teacher, q)
    error = _quadratic(p, joint.student, p) - 2 * _quadratic(p, joint.cross, q) + wanted
    return error.clamp(min=0) / n + bias.square(), wanted / n + wanted_mean.square()


def explained_share(error: Float[Tensor, " R"], square: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """ρ² of every direction: the share of its mean square that is predicted; below 0 if worse than none."""
    return 1 - error / torch.where(square > 0, square, 1)


def eq30_curve(
    square: Float[Tensor, " R"], share: Float[Tensor, " R"], max_rank: int
) -> Float[Tensor, " max_rank+1"]:
    """Eq. 30 at every rank 0..max_rank: Σ_{i>r} λ_i ρ_i² + Σ_{i≤r} λ_i (1 − ρ_i²)."""
    share = share.clamp(0, 1)
    change = (square * (1 - 2 * share))[:max_rank]
    return torch.cat([change.new_zeros(1), change.cumsum(0)]) + (square * share).sum()


def linear_cka(joint: Joint) -> float:
    """Linear centred kernel alignment: ‖C_ST‖² / (‖C_SS‖ ‖C_TT‖), in [0, 1]."""
    norm = torch.linalg.matrix_norm(joint.student) * torch.linalg.matrix_norm(joint.teacher)
    return float(torch.linalg.matrix_norm(joint.cross).square() / norm) if norm > 0 else 0.0


def _quadratic(a: Tensor, middle: Tensor, b: Tensor) -> Tensor:
    """The diagonal of a · middle · bᵀ."""
    return (a @ middle * b).sum(1)


def _eigenvectors(symmetric: Tensor) -> Tensor:
    """Eigenvectors as rows, by falling eigenvalue, each with its largest entry positive."""
    _, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram⁻¹ right for a positive semi-definite Gram matrix, with a slight ridge where it is nearly singular.

    The matrix is first scaled to unit diagonal, so outlier dimensions do not make it look singular.
    """
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1).rsqrt()
    unit = gram * scale[:, None] * scale
    unit.diagonal().fill_(1)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if failed or factor.diagonal().min().square() < ILL_CONDITIONED:
        unit.diagonal().add_(RIDGE)
        factor = torch.linalg.cholesky(unit)
    return torch.cholesky_solve(right * scale[:, None], factor) * scale[:, None]
