"""How states change from row to row, and not where they are: PHF (arXiv 2606.29340)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.objective.losses import RowLoss, checked_rows, unit


def phf(mask: Bool[Tensor, "B T"]) -> RowLoss:
    """The loss of the rows of `mask`, row-major, of which neighbours in a rollout make a transition.

    With d_t = h_{t+1} − h_t, of length one, row t has 1 − cos(d_S,t, d_T,t) for the direction and, for the
    geometry, the mean over the rollout's transitions u of (⟨d_S,t, d_S,u⟩ − ⟨d_T,t, d_T,u⟩)². Rows without a
    next one have no value of their own. The others count more for it, so that a rollout's mean is that of its
    transitions. Both terms are blind to offsets, the second to rotations too.
    """
    rollouts, rows = mask.nonzero(as_tuple=True)
    follows = (rollouts[1:] == rollouts[:-1]) & (rows[1:] == rows[:-1] + 1)
    first = follows.nonzero()[:, 0]

    def loss(student: Float[Tensor, "N D"], teacher: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
        student, teacher = checked_rows(student, teacher)
        here = first.to(student.device)
        ours, theirs = (unit(rows[here + 1] - rows[here]) for rows in (student, teacher))
        values = (ours - theirs).square().sum(-1) / 2  # 1 − cos, exactly zero where they are equal
        values = values + _geometry(ours, theirs, rollouts[first])
        share = _rows_for_each_transition(rollouts, first).to(values)
        return student.new_zeros(len(student)).index_add(0, here, values * share)

    return loss


def _geometry(
    student: Float[Tensor, "M D"], teacher: Float[Tensor, "M D"], rollouts: Int[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """Of every transition, how its angles to the others of its rollout differ."""
    counts = rollouts.unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(student.split(counts), teacher.split(counts), strict=True)
    return torch.cat([(s @ s.T - t @ t.T).square().mean(-1) for s, t in parts] or [student.new_zeros(0)])


def _rows_for_each_transition(rollouts: Int[Tensor, " N"], first: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """At every transition, rows of its rollout over transitions of its rollout."""
    size = int(rollouts[-1]) + 1 if len(rollouts) else 0
    rows, transitions = (torch.bincount(x, minlength=size) for x in (rollouts, rollouts[first]))
    return (rows.double() / transitions.clamp(min=1))[rollouts[first]]
