"""PHF against its definition, written out row by row in float64."""

import numpy as np
import pytest
import torch

from oprd.objective.transitions import phf

MASK = torch.tensor(
    [
        [1, 1, 1, 0, 1, 1],  # three neighbours, and two
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],  # a row alone
        [1, 1, 0, 0, 0, 0],
    ]
).bool()
TRANSITIONS = {0: [(0, 1), (1, 2), (3, 4)], 1: [], 2: [], 3: [(6, 7)]}  # of rows in their order, by rollout
ROWS = {0: 5, 1: 0, 2: 1, 3: 2}


def draw(width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, int(MASK.sum()), width, generator=generator, dtype=torch.float64)


def by_hand(student, teacher):
    """The value of every row; differentiable."""
    values = [torch.zeros((), dtype=torch.float64)] * len(student)
    for rollout, pairs in TRANSITIONS.items():
        ours, theirs = ([(x[b] - x[a]) / (x[b] - x[a]).norm() for a, b in pairs] for x in (student, teacher))
        for number, (row, _) in enumerate(pairs):
            direction = 1 - ours[number] @ theirs[number]
            gaps = [(ours[number] @ s - theirs[number] @ t) ** 2 for s, t in zip(ours, theirs, strict=True)]
            values[row] = (direction + sum(gaps) / len(gaps)) * ROWS[rollout] / len(pairs)
    return torch.stack(values)


def test_value_and_gradient():
    student, teacher = draw()
    found, wanted = (student.clone().requires_grad_() for _ in range(2))
    weights = torch.rand(len(student), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values, expected = phf(MASK)(found, teacher), by_hand(wanted, teacher)
    np.testing.assert_allclose(values.detach().numpy(), expected.detach().numpy(), atol=1e-12)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    np.testing.assert_allclose(found.grad.numpy(), wanted.grad.numpy(), atol=1e-12)


def test_a_mean_over_rows_is_the_mean_over_transitions():
    student, teacher = draw(seed=2)
    values = phf(MASK)(student, teacher)
    plain = by_hand(student, teacher)[[0, 1, 3]] * 3 / 5
    assert values[:5].mean().item() == pytest.approx(plain.mean().item(), rel=1e-12)


def test_offsets_do_not_matter_and_equal_rows_have_no_loss():
    student, teacher = draw(seed=3)
    loss = phf(MASK)
    torch.testing.assert_close(loss(student + 7, teacher - 3), loss(student, teacher))
    moved = teacher.clone().requires_grad_()
    value = loss(moved, teacher)
    value.sum().backward()
    assert value.abs().max() == 0 and moved.grad.abs().max() == 0


def test_without_any_transition():
    mask = torch.tensor([[True, False, True]])
    rows = torch.randn(2, 4, requires_grad=True)
    values = phf(mask)(rows, torch.randn(2, 4))
    assert values.tolist() == [0, 0]
