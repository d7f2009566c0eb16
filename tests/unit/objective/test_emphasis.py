"""Weights of rows within their rollout, against sums written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.objective import losses
from oprd.objective.emphasis import by_gap, earlier_rows, of_mean_one

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def draw(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rollouts = torch.repeat_interleave(
        torch.arange(len(lengths)) * 2, torch.tensor(lengths)
    )  # some have no row
    return torch.randn(len(rollouts), generator=generator, dtype=torch.float64), rollouts


def by_rollout(values, rollouts):
    return [values[rollouts == number].numpy() for number in rollouts.unique()]


@given(LENGTHS)
def test_earlier_rows_are_those_of_the_paper(lengths):
    advantages, rollouts = draw(lengths)
    expected = []
    for a in by_rollout(advantages, rollouts):
        gaps = np.abs(a)
        expected += [1 + 0.5 * (1 - gaps[:t].sum() / gaps.sum()) for t in range(len(a))]
    np.testing.assert_allclose(earlier_rows(advantages, rollouts).numpy(), expected, rtol=1e-12)


@given(LENGTHS)
def test_the_mean_over_a_rollout_is_one(lengths):
    values, rollouts = draw(lengths)
    weights = of_mean_one(values.abs(), rollouts)
    for here, given_ in zip(by_rollout(weights, rollouts), by_rollout(values.abs(), rollouts), strict=True):
        np.testing.assert_allclose(here, given_ / given_.mean(), rtol=1e-12)


def test_without_any_gap_all_rows_count_alike():
    rollouts = torch.tensor([0, 0, 3])
    zeros = torch.zeros(3)
    assert of_mean_one(earlier_rows(zeros, rollouts), rollouts).tolist() == [1, 1, 1]
    assert of_mean_one(zeros, rollouts).tolist() == [1, 1, 1]
    assert len(earlier_rows(zeros[:0], rollouts[:0])) == len(of_mean_one(zeros[:0], rollouts[:0])) == 0


@pytest.mark.parametrize("lengths", [[3, 1, 4], [1]])
def test_a_loss_by_its_gap(lengths):
    """The weight is a constant: no gradient passes through it."""
    _, rollouts = draw(lengths)
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(len(rollouts), 5, generator=generator, dtype=torch.float64) for _ in "st")
    student.requires_grad_()
    values = by_gap(losses.mse, rollouts)(student, teacher)
    values.sum().backward()
    plain = losses.mse(student.detach(), teacher)
    weights = np.concatenate([v / v.mean() for v in by_rollout(plain, rollouts)])
    np.testing.assert_allclose(values.detach().numpy(), plain.numpy() * weights, rtol=1e-12)
    slope = 2 * (student.detach() - teacher).numpy() / 5 * weights[:, None]
    np.testing.assert_allclose(student.grad.numpy(), slope, rtol=1e-12)
