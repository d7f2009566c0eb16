"""The fit of one pair of layers: teacher directions, P_S, what held-out rows say, and the rank."""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.bridge.artifact import Projector
from oprd.bridge.held_out import LayerReport, cosine_curve, project, random_predictor
from oprd.bridge.solve import (
    Joint,
    Predictor,
    Target,
    direction_errors,
    eq30_curve,
    explained_share,
    inverse_deviations,
    least_squares,
    linear_cka,
    principal_directions,
    shared_directions,
)
from oprd.foundation.errors import UserError
from oprd.foundation.ranges import check_ranges

Method = Literal["pca", "rrr"]
Directions = Literal["leading", "predictable"]
Rank = int | Literal["auto"]

TIE = 1e-6  # relative difference of held-out errors that decides nothing


@dataclass(frozen=True)
class FitSettings:
    """How projectors are made from moments.

    `method`: `pca`, the teacher's largest directions (Eq. 12); `rrr`, reduced-rank regression: directions
    that the student explains. `affine`: with an offset b; None decides per layer by the held-out
    error. `standardize`: divide every dimension by its deviation first. `directions`: the leading ones,
    or those of the largest held-out gain, which under `auto` are all with ρ² ≥ ½. Raises `UserError`.
    """

    max_rank: int = 256
    method: Method = "pca"
    affine: bool | None = None
    standardize: bool = False
    directions: Directions = "leading"

    def __post_init__(self) -> None:
        check_ranges(vars(self))
        for name, allowed in (("method", Method), ("directions", Directions)):
            if getattr(self, name) not in get_args(allowed):
                known = ", ".join(get_args(allowed))
                raise UserError(f"{name}: {getattr(self, name)!r} is not one of {known}")


@dataclass(frozen=True)
class PairRows:
    """Everything the fit of one pair of layers is made from."""

    training: Joint
    held_out: Joint
    both: Joint
    student_sample: Float[Tensor, "K S"]
    teacher_sample: Float[Tensor, "K T"]

    @property
    def can_measure(self) -> bool:
        """Whether there are rows on both sides of the split."""
        return bool(self.training.count and self.held_out.count)

    def scaled(self, student: Float[Tensor, " S"], teacher: Float[Tensor, " T"]) -> "PairRows":
        """The same rows with every dimension multiplied by its scale."""
        return PairRows(
            self.training.scaled(student, teacher),
            self.held_out.scaled(student, teacher),
            self.both.scaled(student, teacher),
            self.student_sample.double() * student.cpu(),
            self.teacher_sample.double() * teacher.cpu(),
        )


@dataclass(frozen=True)
class Measured:
    """Held-out measures of every direction: λ, ρ² and the predictor they belong to."""

    target: Target
    predictor: Predictor
    affine: bool
    error: Float[Tensor, " R"]
    square: Float[Tensor, " R"]

    @property
    def share(self) -> Float[Tensor, " R"]:
        """ρ² of every direction."""
        return explained_share(self.error, self.square)


def fit_pair(
    rows: PairRows, teacher_layer: int, rank: Rank, settings: FitSettings
) -> tuple[Projector, LayerReport]:
    """The projector of one pair of layers, possibly of rank 0, and its report."""
    rows, scales = _standardized(rows, settings)
    target = Target(_directions(rows, settings.method), rows.both.teacher_mean)
    measured = measure(rows, target, settings) if rows.can_measure else None
    chosen = _choose(measured, len(target.directions), rank, settings)
    affine = measured.affine if measured else settings.affine is not False
    final = Target(target.directions[chosen], target.mean)
    predictor = least_squares(rows.both, final, affine)
    projector = Projector(
        teacher_layer,
        predictor.matrix * scales[0],
        predictor.offset,
        final.directions * scales[1],
        target.mean / scales[1],
    )
    return projector, _report(rows, teacher_layer, measured, target, chosen, affine, settings)


def _standardized(rows: PairRows, settings: FitSettings) -> tuple[PairRows, tuple[Tensor, Tensor]]:
    """The rows as they are fitted, and the scale of every dimension."""
    both = rows.both
    if not settings.standardize:
        return rows, (torch.ones_like(both.student_mean), torch.ones_like(both.teacher_mean))
    scales = inverse_deviations(both.student, both.count), inverse_deviations(both.teacher, both.count)
    return rows.scaled(*scales), scales


def measure(rows: PairRows, target: Target, settings: FitSettings) -> Measured:
    """P_S fitted on the training rows for every direction, with or without offset, tried on held-out rows."""
    tried = {}
    for affine in (True, False) if settings.affine is None else (settings.affine,):
        predictor = least_squares(rows.training, target, affine)
        errors = direction_errors(rows.held_out, predictor, target)
        tried[affine] = Measured(target, predictor, affine, *errors)
    if len(tried) == 1:
        return tried.popitem()[1]
    plain_is_better = tried[False].error.sum() < tried[True].error.sum() * (1 - TIE)
    return tried[not plain_is_better]


def alignment(rows: PairRows, settings: FitSettings) -> float:
    """How well a pair fits: the predicted share of the held-out variance in the first directions."""
    rows, _ = _standardized(rows, settings)
    measured = measure(rows, Target(_directions(rows, settings.method), rows.both.teacher_mean), settings)
    square = measured.square[: settings.max_rank]
    predicted = (square * measured.share[: settings.max_rank].clamp(0, 1)).sum()
    return float(predicted / square.sum()) if square.sum() > 0 else 0.0


def _directions(rows: PairRows, method: Method) -> Float[Tensor, "R T"]:
    """PCA uses the teacher alone, so all its rows; what uses the student leaves held-out rows out."""
    if method == "pca":
        return principal_directions(rows.both)
    return shared_directions(rows.training if rows.can_measure else rows.both)


def _choose(
    measured: Measured | None, available: int, rank: Rank, settings: FitSettings
) -> Int[Tensor, " r"]:
    """The indices of the directions that are kept."""
    if isinstance(rank, int) and rank > available:
        raise UserError(
            f"rank {rank} is too high for a bridge: the teacher's states have {available} directions"
        )
    if measured is None:
        if rank == "auto" or settings.directions == "predictable":
            raise UserError(
                "there are no held-out rows to choose a rank or directions by: give more rollouts, raise "
                "holdout, or set a rank with directions: leading"
            )
        return torch.arange(rank)
    cap = min(settings.max_rank, available)
    if settings.directions == "leading":
        if rank == "auto":
            rank = int(eq30_curve(measured.square, measured.share, cap).argmin())
        return torch.arange(rank)
    gain = measured.square * (2 * measured.share.clamp(0, 1) - 1)
    best = gain.argsort(descending=True, stable=True)
    if rank == "auto":
        best = best[(gain[best] >= 0) & (measured.square[best] > 0)]
    best = best[: cap if rank == "auto" else rank]
    return best.sort().values.cpu()


def _report(
    rows: PairRows,
    teacher_layer: int,
    measured: Measured | None,
    target: Target,
    chosen: Int[Tensor, " r"],
    affine: bool,
    settings: FitSettings,
) -> LayerReport:
    variance = (target.directions @ rows.both.teacher * target.directions).sum(1)
    total = variance.sum()
    explained = _curve(variance.cumsum(0) / torch.where(total > 0, total, 1), settings.max_rank)
    report = LayerReport(
        teacher_layer=teacher_layer,
        rank=len(chosen),
        directions=chosen.tolist(),
        affine=affine,
        num_rows=rows.both.count,
        num_held_out=rows.held_out.count,
        cka=linear_cka(rows.both),
        explained=explained,
    )
    return (
        report if measured is None else replace(report, **_held_out_curves(rows, measured, chosen, settings))
    )


def _held_out_curves(
    rows: PairRows, measured: Measured, chosen: Int[Tensor, " r"], settings: FitSettings
) -> dict[str, Any]:
    """Curves over ranks up to `max_rank`, and the cosine of the chosen directions."""
    cap = min(settings.max_rank, len(measured.square))
    before = random_predictor(len(measured.square), len(rows.both.student_mean)).first(cap)
    target = Target(measured.target.directions[:cap], measured.target.mean)
    ranks = torch.arange(1, cap + 1)
    samples = rows.student_sample, rows.teacher_sample
    untrained_error, _ = direction_errors(rows.held_out, before, target)
    predicted, wanted = project(measured.predictor, measured.target, *samples)
    return {
        "cosine_at_rank": float(cosine_curve(predicted[:, chosen], wanted[:, chosen])[-1])
        if len(chosen)
        else None,
        "variance": _curve(measured.square, cap),
        "share": _curve(measured.share, cap),
        "error": _curve(eq30_curve(measured.square, measured.share, cap), cap + 1),
        "mse": _curve(measured.error[:cap].cumsum(0) / ranks, cap),
        "mse_before": _curve(untrained_error.cumsum(0) / ranks, cap),
        "cosine": _curve(cosine_curve(predicted[:, :cap], wanted[:, :cap]), cap),
        "cosine_before": _curve(cosine_curve(*project(before, target, *samples)), cap),
    }


def _curve(values: Tensor, length: int) -> list[float]:
    """Values for a report, to seven digits."""
    return [float(f"{value:.7g}") for value in values[:length].tolist()]
