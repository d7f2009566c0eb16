"""Schedules and the one place that reduces."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

from oprd import losses
from oprd.foundation.errors import UserError
from oprd.models.freezing import freeze_unreached
from oprd.objective.composite import Schedule, num_units, row_weights, weighted_loss
from oprd.objective.selection import LayerMap
from oprd.objective.settings import ObjectiveSettings

WEIGHTS = st.just(0.0) | st.floats(1e-6, 100)
KNOTS = st.lists(
    st.tuples(st.integers(0, 1000), WEIGHTS), min_size=1, max_size=6, unique_by=lambda knot: knot[0]
).map(sorted)
MASKS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=9)


def text(knots):
    return ",".join(f"{step}={value!r}" for step, value in knots)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("0.3", {0: 0.3, 10**6: 0.3}),
        (2, {0: 2.0, 7: 2.0}),
        (0.5, {3: 0.5}),
        ("1e-2", {0: 0.01}),
        ("0=1.0,400=0", {0: 1.0, 100: 0.75, 399: 0.0025, 400: 0.0, 500: 0.0}),
        ("399=1,400=0", {0: 1.0, 399: 1.0, 400: 0.0, 401: 0.0}),
        ("0=0,10=1,20=1,30=0.5", {0: 0.0, 5: 0.5, 10: 1.0, 15: 1.0, 25: 0.75, 30: 0.5, 99: 0.5}),
        (" 0 = 1 , 2 = 3 ", {1: 2.0}),
        ("5=2", {0: 2.0, 5: 2.0, 9: 2.0}),
    ],
)
def test_schedule_values(spec, values):
    schedule = Schedule.parse(spec)
    assert {step: schedule(step) for step in values} == pytest.approx(values)


@settings(deadline=None)  # the machine may be busy
@given(KNOTS, st.integers(0, 1200))
def test_schedule_is_piecewise_linear_and_constant_outside(knots, step):
    schedule = Schedule.parse(text(knots))
    steps, values = zip(*knots, strict=True)
    for at, value in knots:
        assert schedule(at) == value
    assert min(values) - 1e-9 <= schedule(step) <= max(values) + 1e-9
    if step <= steps[0]:
        assert schedule(step) == values[0]
    elif step >= steps[-1]:
        assert schedule(step) == values[-1]
    else:
        i = max(i for i, at in enumerate(steps) if at <= step)
        share = (step - steps[i]) / (steps[i + 1] - steps[i])
        assert schedule(step) == pytest.approx((1 - share) * values[i] + share * values[i + 1], abs=1e-9)


def test_a_zero_knot_is_exactly_zero():
    """A rounding residue there would run a term that has no weight."""
    for low in (0.1, 0.3, 1.0, 23.806237760154087):
        assert [Schedule.parse(f"0={low},{step}=0")(step) for step in range(1, 500)] == [0.0] * 499


@settings(deadline=None)  # the machine may be busy
@given(KNOTS)
def test_schedule_activity(knots):
    schedule = Schedule.parse(text(knots))
    weights = [schedule(step) for step in range(1002)]
    # A weight between two knots is positive where either is, so the knots decide.
    assert schedule.ever_active is any(value > 0 for _, value in knots)
    assert schedule.always_active is all(value > 0 for _, value in knots)
    assert not schedule.always_active or all(weight > 0 for weight in weights)
    assert schedule.ever_active or not any(weights)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "cannot read ''"),
        ("one", "cannot read 'one'"),
        ("0=1,", "cannot read"),
        ("0=1=2", "cannot read"),
        ("0.5=1", "cannot read"),
        ("0=1;400=0", "cannot read"),
        ("10=1,10=0", "increase strictly"),
        ("10=1,5=0", "increase strictly"),
        ("-1=1,5=0", "from 0"),
        ("-0.5", "finite number, 0 or more"),
        ("0=1,5=-1", "finite number, 0 or more"),
        ("nan", "finite number, 0 or more"),
        ("0=inf", "finite number, 0 or more"),
    ],
)
def test_schedule_refused(spec, message):
    with pytest.raises(UserError, match=message) as caught:
        Schedule.parse(spec, "representation_weight")
    assert str(caught.value).startswith("representation_weight")


@settings(deadline=None)  # the machine may be busy
@given(MASKS, st.sampled_from(["rollout", "token"]), st.lists(st.integers(0, 9), max_size=4))
def test_weights_of_any_split_sum_to_one(rows, reduction, cuts):
    mask = torch.tensor(rows)
    edges = sorted({0, len(mask), *(min(cut, len(mask)) for cut in cuts)})
    parts = [mask[a:b] for a, b in pairwise(edges)]
    total = sum(num_units(part, reduction) for part in parts)
    assert int(total) == int(num_units(mask, reduction))
    weights = torch.cat([row_weights(part, reduction, total) for part in parts])
    torch.testing.assert_close(weights, row_weights(mask, reduction, total), rtol=0, atol=0)
    assert torch.equal(weights > 0, mask)
    assert weights.sum().item() == pytest.approx(float(mask.any()), abs=1e-5)


def test_row_weights_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    assert int(num_units(mask, "rollout")) == 3 and int(num_units(mask, "token")) == 7
    by_rollout = torch.tensor([[1 / 6] * 2 + [0] * 2, [0] * 4, [1 / 12] * 4, [0, 0, 1 / 3, 0]])
    torch.testing.assert_close(row_weights(mask, "rollout", 3), by_rollout)
    torch.testing.assert_close(row_weights(mask, "token", 7), mask / 7)


@pytest.mark.parametrize("reduction", ["rollout", "token"])
def test_an_empty_mask_weighs_nothing(reduction):
    mask = torch.zeros(3, 4, dtype=torch.bool)
    assert int(num_units(mask, reduction)) == 0
    assert torch.equal(row_weights(mask, reduction, 0), torch.zeros(3, 4))


@pytest.mark.parametrize("loss", losses.REPRESENTATION_LOSSES.values(), ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_weighted_loss_is_its_plain_version(loss, dtype, tolerance, rows):
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, 4, dtype=dtype, requires_grad=True) for _ in "st")
    weights = torch.rand(rows, dtype=torch.float64)
    total, values = weighted_loss(loss, student, teacher, weights)
    (gradient,) = torch.autograd.grad(7 * total, student)
    plain = loss(student, teacher)
    expected = (plain * weights.to(plain)).sum()
    (wanted,) = torch.autograd.grad(7 * expected, student)
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(values, plain) and not values.requires_grad
    assert gradient.shape == student.shape and (rows == 0 or gradient.norm() > 0)
    with torch.no_grad():
        assert torch.equal(weighted_loss(loss, student, teacher, weights)[0], total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weighted_loss_keeps_one_gradient_in_half_precision(dtype):
    """What autograd holds on to: the gradient, in the student's dtype unless that has float16's range."""
    student, teacher = (torch.randn(50, 8).to(dtype).requires_grad_() for _ in "st")
    weights = torch.full((50,), 1e-6)
    total, values = weighted_loss(losses.relative_mse, student, teacher, weights)
    assert total.dtype == values.dtype == torch.float32
    (one,) = total.grad_fn.saved_tensors
    assert (one.shape, one.dtype) == (student.shape, torch.float32 if dtype == torch.float16 else dtype)
    (gradient,) = torch.autograd.grad(2**16 * total, student)
    exact = student.detach().double().requires_grad_()
    expected = 2**16 * (losses.relative_mse(exact, teacher.double()) * weights).sum()
    (wanted,) = torch.autograd.grad(expected, exact)
    assert gradient.dtype == dtype and (gradient.double() - wanted).norm() < 4e-3 * wanted.norm()


def test_a_norm_that_is_declared_before_the_blocks_is_frozen_too():
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 41}
    student = OPTForCausalLM(OPTConfig(num_hidden_layers=3, word_embed_proj_dim=16, **sizes))
    frozen = freeze_unreached(student, ObjectiveSettings(layers="1"), LayerMap.parse("1", 3, 3))
    left = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert "the final norm" in frozen and not any("decoder.final_layer_norm" in name for name in left)
    assert {name.split(".")[3] for name in left if ".layers." in name} == {"0"}
    assert any("embed_positions" in name for name in left)
