"""The training objective (Eq. 7): output and representation losses, weighted, scheduled, reduced once.

Losses give one value per row. Here every row gets its weight, from counts taken across ranks and the
whole accumulation window before the forward, so neither micro-batching nor sharding changes the sum.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from oprd.foundation.errors import UserError
from oprd.objective.losses import RowLoss

Reduction = Literal["rollout", "token"]


@dataclass(frozen=True)
class Schedule:
    """A weight over optimiser steps: piecewise linear between knots, constant outside."""

    knots: tuple[tuple[int, float], ...]

    @classmethod
    def parse(cls, spec: str | float, name: str = "weight") -> "Schedule":
        """Read a number or `step=value,…`; step 0 is the first update.

        Raises `UserError` for steps that do not increase, negative or non-finite weights, other forms.
        """
        text = str(spec).strip()
        try:
            if "=" not in text:
                knots = [(0, float(text))]
            else:
                pairs = [item.split("=") for item in text.split(",")]
                knots = [(int(step), float(value)) for step, value in pairs]
        except ValueError:
            raise UserError(
                f"{name}: cannot read {text!r}; write a number, or a schedule such as '0=1.0,400=0'"
            ) from None
        steps = [step for step, _ in knots]
        if steps[0] < 0 or any(a >= b for a, b in pairwise(steps)):
            raise UserError(
                f"{name}={text!r}: the steps of a schedule must increase strictly, from 0 or later"
            )
        if any(not math.isfinite(value) or value < 0 for _, value in knots):
            raise UserError(f"{name}={text!r}: a weight must be a finite number, 0 or more")
        return cls(tuple(knots))

    def __call__(self, step: int) -> float:
        """The weight of update `step`, 0-based."""
        if step <= self.knots[0][0]:
            return self.knots[0][1]
        for (left, low), (right, high) in pairwise(self.knots):
            if step <= right:
                share = (step - left) / (right - left)
                return low * (1 - share) + high * share
        return self.knots[-1][1]

    @property
    def ever_active(self) -> bool:
        """Whether the weight is above zero at any step."""
        return any(value > 0 for _, value in self.knots)

    @property
    def always_active(self) -> bool:
        """Whether the weight is above zero at every step."""
        return all(value > 0 for _, value in self.knots)


def num_units(mask: Bool[Tensor, "B T"], reduction: Reduction) -> Tensor:
    """What a mean is taken over: rollouts with at least one supervised row, or supervised rows."""
    return mask.any(-1).sum() if reduction == "rollout" else mask.sum()


def row_weights(
    mask: Bool[Tensor, "B T"], reduction: Reduction, total_units: Tensor | int
) -> Float[Tensor, "B T"]:
    """Weight of every row; the weights of all micro-batches and ranks together sum to one.

    `rollout`: the mean over a rollout's rows, then over rollouts (Eq. 6). `token`: the mean over all
    supervised rows. `total_units` is `num_units` summed over ranks and the accumulation window.
    """
    weights = mask.float()
    if reduction == "rollout":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return weights / torch.as_tensor(total_units, device=mask.device).clamp(min=1)


def weighted_loss(
    loss: RowLoss,
    student: Float[Tensor, "N D"],
    teacher: Float[Tensor, "N D"],
    weights: Float[Tensor, " N"],
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
    """Eq. 6 or 14 at one layer, Σ_rows weight · loss, and the rows' values, without gradient.

    The gradient is taken at once: of all that the loss computes nothing but d Σ / d student, in the
    student's dtype, is kept for the backward.
    """
    if not (torch.is_grad_enabled() and student.requires_grad):
        values = loss(student, teacher)
        return (values * weights.to(values)).sum(), values
    return _WeightedLoss.apply(loss, student, teacher, weights)


class _WeightedLoss(torch.autograd.Function):
    """A weighted sum of row losses, differentiated in the forward."""

    @staticmethod
    def forward(
        ctx: Any, loss: RowLoss, student: Tensor, teacher: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            rows = student.detach().to(torch.promote_types(student.dtype, torch.float32)).requires_grad_()
            values = loss(rows, teacher)
            total = (values * weights.to(values)).sum()
            (gradient,) = torch.autograd.grad(total, rows)
        # Before the loss is scaled up, float16 could not hold it.
        kept = gradient if student.dtype == torch.float16 else gradient.to(student.dtype)
        ctx.save_for_backward(kept)
        ctx.dtype = student.dtype
        values = values.detach()
        ctx.mark_non_differentiable(values)
        return total.detach(), values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grads[0]).to(ctx.dtype), None, None
