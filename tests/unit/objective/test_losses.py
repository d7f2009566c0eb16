"""Representation losses against the float64 reference, in value and gradient."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import reference_losses as reference
from oprd import losses
from oprd.foundation.errors import UserError

NAMES = ["mse", "normalized_mse", "cosine", "relative_mse", "smooth_l1"]
SHAPES = [(1, 1), (1, 33), (7, 33), (5, 1), (2, 4), (0, 33)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

NAIVE = {
    "mse": lambda s, t: (s - t).pow(2).mean(-1),
    "normalized_mse": lambda s, t: (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).pow(2).sum(-1),
    "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1),
    "relative_mse": lambda s, t: (s - t).pow(2).sum(-1) / t.pow(2).sum(-1),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t, reduction="none").mean(-1),
}


def make_rows(shape, dtype=torch.float64, scale=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "st")
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def run(loss, student, teacher):
    """Value and gradient as float64 arrays; each row's upstream gradient is 1."""
    student.grad = None
    value = loss(student, teacher)
    value.sum().backward()
    return value.detach().double().numpy(), student.grad.double().numpy()


def expected(name, student, teacher):
    return getattr(reference, name)(student.detach().double().numpy(), teacher.detach().double().numpy())


def assert_close(actual, wanted, tolerance):
    scale = max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * scale)


def test_every_loss_is_tested():
    assert list(losses.REPRESENTATION_LOSSES) == NAMES
    assert all(losses.REPRESENTATION_LOSSES[name] is getattr(losses, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_reference_gradient_is_the_derivative_of_its_value(name):
    student, teacher = (x.detach().numpy() for x in make_rows((3, 5)))
    loss = getattr(reference, name)
    numeric = reference.central_differences(lambda s: loss(s, teacher)[0], student)
    np.testing.assert_allclose(loss(student, teacher)[1], numeric, atol=1e-8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(name, shape, dtype):
    student, teacher = make_rows(shape, dtype)
    value, gradient = run(getattr(losses, name), student, teacher)
    wanted_value, wanted_gradient = expected(name, student, teacher)
    assert value.shape == shape[:1] and gradient.shape == shape
    assert_close(value, wanted_value, TOLERANCE[dtype])
    assert_close(gradient, wanted_gradient, TOLERANCE[dtype])
    assert teacher.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_as_good_as_its_inputs(name):
    student, teacher = make_rows((7, 33), torch.bfloat16)
    wanted_value, wanted_gradient = expected(name, student, teacher)
    naive_value, naive_gradient = run(NAIVE[name], student, teacher.detach())
    value, gradient = run(getattr(losses, name), student, teacher)

    def worst(actual, wanted):
        return np.abs(actual - wanted).max()

    assert worst(value, wanted_value) <= 2 * worst(naive_value, wanted_value)
    assert worst(gradient, wanted_gradient) <= 2 * worst(naive_gradient, wanted_gradient)
    assert_close(value, wanted_value, 1e-5)  # Computed in float32; only the gradient is stored in bfloat16.
    np.testing.assert_allclose(gradient, wanted_gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_large_states(name, dtype):
    student, teacher = make_rows((7, 33), dtype, scale=1e4)
    value, gradient = run(getattr(losses, name), student, teacher)
    wanted_value, wanted_gradient = expected(name, student, teacher)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    np.testing.assert_allclose(
        gradient, wanted_gradient, rtol=rtol, atol=1e-3 * np.abs(wanted_gradient).max()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_equal_rows_give_exactly_zero(name, scale, dtype):
    student, _ = make_rows((7, 33), dtype, scale)
    for teacher in (student, student.detach().clone()):
        value, gradient = run(getattr(losses, name), student, teacher)
        assert (value == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize(("student_scale", "teacher_scale"), [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_count_as_norm_one(name, student_scale, teacher_scale):
    student, teacher = (x.detach() for x in make_rows((3, 5)))
    student[1] *= student_scale
    teacher[1] *= teacher_scale
    value, gradient = run(getattr(losses, name), student.requires_grad_(), teacher)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    if name == "cosine":
        wanted_value, wanted_gradient = (x / 2 for x in expected("normalized_mse", student, teacher))
    else:
        wanted_value, wanted_gradient = expected(name, student, teacher)
    assert_close(value, wanted_value, 1e-12)
    others = [0, 2] if name in ("normalized_mse", "cosine") and student_scale == 0 else [0, 1, 2]
    assert_close(gradient[others], wanted_gradient[others], 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_dtypes_are_widened(name):
    student, teacher = make_rows((2, 5), torch.float32)
    value = getattr(losses, name)(student.detach().bfloat16(), teacher.double())
    assert value.dtype == torch.float64
    assert getattr(losses, name)(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["normalized_mse", "cosine"])
def test_directional_losses_ignore_scale_and_are_bounded(name):
    student, teacher = make_rows((7, 33))
    loss = getattr(losses, name)
    bound = {"normalized_mse": 4, "cosine": 2}[name]
    assert torch.allclose(loss(37 * student, 0.01 * teacher), loss(student, teacher), rtol=1e-12)
    assert torch.allclose(loss(-teacher, teacher), torch.full((7,), bound, dtype=torch.float64))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((3, 4), (3, 5)), ((3, 4), (2, 4)), ((3, 4), (1, 4)), ((4,), (4,)), ((1, 3, 4),) * 2],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused(name, student, teacher):
    with pytest.raises(UserError, match="rows"):
        getattr(losses, name)(torch.zeros(student), torch.zeros(teacher))
