"""Rows of both losses reweighed by what is yet to come of their rollout's gap (IW-OPD)."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor

from oprd.objective.emphasis import earlier_rows, of_mean_one
from oprd.objective.terms import OUTPUT, REPRESENTATION
from oprd.rollouts.rows import SupervisedRows

RowsByTerm = dict[str, SupervisedRows]
Advantages = Callable[[Bool[Tensor, "B T"]], Float[Tensor, " N"]]


def by_importance(rows: RowsByTerm, written: Bool[Tensor, "B T"], advantages: Advantages) -> RowsByTerm:
    """The rows with other weights, whose mean over a rollout is as before; those of the anchor stay.

    `advantages` gives log p − log q of the sampled tokens at the rows of a mask, row-major. It is asked for
    all rows that the student has `written`.
    """
    terms = [term for term in (REPRESENTATION, OUTPUT) if term in rows]
    if not terms:
        return rows
    found = advantages(written)
    importance = earlier_rows(found, written.nonzero()[:, 0].to(found.device))
    reweighed = {}
    for term in terms:
        here = rows[term]
        weights = importance[here.mask[written].to(importance.device)].to(here.weights)
        reweighed[term] = replace(here, weights=here.weights * of_mean_one(weights, here.rollouts))
    return rows | reweighed
