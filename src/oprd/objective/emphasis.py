"""Rows that count more than others of their rollout.

`rollouts` numbers the rollout of every row; rows of one rollout stand together, in order.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from oprd.objective.losses import RowLoss

GAMMA = 0.5  # the paper's γ

Rows = Float[Tensor, " N"]
Rollouts = Int[Tensor, " N"]


def earlier_rows(advantages: Rows, rollouts: Rollouts, gamma: float = GAMMA) -> Rows:
    """1 + γ (1 − Σ_{i<t} |A_i| / Σ_i |A_i|): a row counts more, the more of the rollout's gap is yet to come.

    A is the advantage log p − log q of the sampled token. Of rollouts without any gap all rows count alike.
    Its mean over a rollout lies between 1 and 1 + γ (`of_mean_one`). Source: IW-OPD, arXiv 2606.22600.
    """
    gaps = advantages.abs()
    total = _sums(gaps, rollouts)
    whole = gaps.cumsum(0) - gaps
    before = whole - whole[_first_rows(rollouts)]
    return 1 + gamma * (1 - before / total.where(total > 0, 1))


def of_mean_one(weights: Rows, rollouts: Rollouts) -> Rows:
    """Weights divided by their mean over each rollout; where that is zero, all are 1."""
    means = _sums(weights, rollouts) / _sums(torch.ones_like(weights), rollouts)
    return torch.where(means > 0, weights / means.where(means > 0, 1), 1)


def by_gap(loss: RowLoss, rollouts: Rollouts) -> RowLoss:
    """A row loss times its own size over the mean of the rollout: rows that are far off count more."""

    def weighted(student: Tensor, teacher: Tensor) -> Rows:
        values = loss(student, teacher)
        return values * of_mean_one(values.detach(), rollouts.to(values.device))

    return weighted


def _sums(values: Rows, rollouts: Rollouts) -> Rows:
    """At every row, the sum over its rollout."""
    if not len(values):
        return values
    sums = values.new_zeros(int(rollouts[-1]) + 1)
    return sums.index_add(0, rollouts, values)[rollouts]


def _first_rows(rollouts: Rollouts) -> Int[Tensor, " N"]:
    """At every row, the place of the first row of its rollout."""
    return torch.searchsorted(rollouts, rollouts)
