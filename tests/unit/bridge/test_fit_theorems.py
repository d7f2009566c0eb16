"""What must hold of any fit, against NumPy on all rows: optimal, exact however it is streamed, nested."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gather_worker
import reference_fit as reference
from oprd import losses
from oprd.bridge import Bridge
from oprd.bridge.artifact import TENSORS
from oprd.bridge.held_out import is_held_out, rollout_hash

FORMS = [False, True]
few = settings(max_examples=12, deadline=None)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 60), st.integers(0, 99))


def drawn_rows(drawn):
    """Rows of both models: odd widths, from the fewest that can be fitted."""
    student_width, teacher_width, more, seed = drawn
    return reference.make_rows(
        max(student_width, teacher_width) + 1 + more, student_width, teacher_width, seed
    )


def assert_same(actual, wanted, tolerance=0.0):
    """Two bridges: the same layers and projectors."""
    assert actual.layer_map == wanted.layer_map and actual.ranks == wanted.ranks
    for layer, projector in wanted.projectors.items():
        for name in TENSORS:
            one, two = getattr(actual.projectors[layer], name), getattr(projector, name)
            scale = tolerance * max(1.0, float(two.abs().max()))
            torch.testing.assert_close(one, two, rtol=0, atol=scale)


def assert_same_report(actual, wanted):
    """Reports are written to seven digits; rounding may move the last."""
    assert actual.metadata.keys() == wanted.metadata.keys()
    for layer, values in wanted.metadata["layers"].items():
        for name, value in values.items():
            other = actual.metadata["layers"][layer][name]
            assert other == (value if value is None else pytest.approx(value, rel=1e-6, abs=1e-9)), name


# Optimality


@few
@given(drawn=sizes)
def test_teacher_projection_is_the_principal_components(fit, drawn):
    student, teacher = drawn_rows(drawn)
    projector = fit(student, teacher, teacher.shape[1]).projectors[1]
    actual = projector.teacher.numpy()
    np.testing.assert_allclose(actual, reference.principal_directions(teacher), atol=1e-7)
    np.testing.assert_allclose(actual @ actual.T, np.eye(len(actual)), atol=1e-12)
    np.testing.assert_allclose(projector.mean, teacher.mean(0), atol=1e-12)
    assert (actual.max(1) == np.abs(actual).max(1)).all()


@pytest.mark.parametrize("affine", FORMS)
@few
@given(drawn=sizes)
def test_student_projection_is_least_squares(fit, affine, drawn):
    student, teacher = drawn_rows(drawn)
    projector = fit(student, teacher, teacher.shape[1], affine=affine).projectors[1]
    wanted = (teacher - teacher.mean(0)) @ projector.teacher.numpy().T
    matrix, offset = reference.least_squares(student, wanted, affine)
    scale = max(1.0, np.abs(matrix).max())
    np.testing.assert_allclose(projector.student, matrix, atol=1e-7 * scale)
    np.testing.assert_allclose(projector.offset, offset, atol=1e-7 * scale)


@pytest.mark.parametrize("affine", FORMS)
def test_nothing_near_has_a_lower_error(fit, affine):
    student, teacher = reference.make_rows(150, 7, 5)
    projector = fit(student, teacher, 3, affine=affine).projectors[1]
    least = reference.mean_squared_error(student, teacher, projector)
    rng = np.random.default_rng(0)
    for scale in (1e-4, 1e-2, 1.0):
        for _ in range(20):
            moved = projector.first(3)
            moved.student.add_(torch.from_numpy(step := scale * rng.normal(size=(3, 7))))
            assert reference.mean_squared_error(student, teacher, moved) > least
            moved.student.sub_(torch.from_numpy(step))
            if affine:
                moved.offset.add_(torch.from_numpy(step := scale * rng.normal(size=3)))
                assert reference.mean_squared_error(student, teacher, moved) > least
                moved.offset.sub_(torch.from_numpy(step))


@pytest.mark.parametrize("affine", FORMS)
def test_normal_equations(fit, affine):
    student, teacher = reference.make_rows(150, 7, 5)
    projector = fit(student, teacher, 4, affine=affine).projectors[1]
    wanted = (teacher - teacher.mean(0)) @ projector.teacher.numpy().T
    residual = student @ projector.student.numpy().T + projector.offset.numpy() - wanted
    np.testing.assert_allclose(student.T @ residual, 0, atol=1e-10)
    assert affine == bool(np.abs(residual.sum(0)).max() < 1e-10)
    assert affine == bool(projector.offset.any())


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"method": "rrr"}, {"standardize": True}], ids=str
)
def test_lower_ranks_are_slices(filled, tmp_path, options):
    fitter = filled(*reference.make_rows(400, 19, 17), **options)
    large, small = fitter.fit(16), fitter.fit(4)
    assert_same(Bridge.load(large.save(tmp_path), rank=4), large.first(4))
    assert_same(large.first(4), small, 1e-14)  # products of other shapes may round differently
    assert large.ranks == {1: 16}  # untouched


def test_reduced_rank_regression_is_optimal_at_every_rank(fit):
    student, teacher = reference.make_rows(200, 6, 9)
    directions, least = reference.reduced_rank(student, teacher)
    bridge = fit(student, teacher, 6, method="rrr", affine=True, holdout=0)
    np.testing.assert_allclose(bridge.projectors[1].teacher, directions[:6], atol=1e-9)
    for rank in range(1, 7):
        projector = bridge.first(rank).projectors[1]
        q = projector.teacher.numpy()
        np.testing.assert_allclose(q @ q.T, np.eye(rank), atol=1e-12)
        shared = student @ projector.student.numpy().T + projector.offset.numpy()
        predicted = teacher.mean(0) + shared @ q
        assert ((teacher - predicted) ** 2).sum() == pytest.approx(least[rank - 1], rel=1e-10)
    principal = fit(student, teacher, 6, affine=True, holdout=0)
    assert principal.metadata["layers"]["1"]["explained"][2] > bridge.metadata["layers"]["1"]["explained"][2]


# Streaming


@few
@given(drawn=sizes, cuts=st.lists(st.integers(0, 70), max_size=5), half=st.integers(0, 70))
def test_chunks_and_merged_halves_equal_the_whole(filled, drawn, cuts, half):
    student, teacher = drawn_rows(drawn)
    count, rank = len(student), min(3, teacher.shape[1])
    ids = np.arange(count) // 3
    whole = filled(student, teacher, ids).fit(rank)
    edges = [0, *sorted(min(cut, count) for cut in cuts), count]  # some chunks are empty
    assert_same(filled(student, teacher, ids, np.diff(edges).tolist()).fit(rank), whole, 1e-7)
    half = min(half, count)
    for order in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        one, two = (filled(student[rows], teacher[rows], ids[rows]) for rows in order)
        one.merge(two)
        assert one.num_rows == count
        assert_same(one.fit(rank), whole, 1e-7)
        assert_same_report(one.fit(rank), whole)


def test_many_small_chunks_lose_no_digits(filled):
    student, teacher = reference.make_rows(3001, 7, 5)
    ids = np.arange(3001) // 10
    whole = filled(student, teacher, ids).fit(4)
    streamed = filled(student, teacher, ids, [1, 1024, 1025, 1, *[10] * 95]).fit(4)
    assert_same(streamed, whole, 1e-12)
    assert_same_report(streamed, whole)


def test_the_order_of_rollouts_changes_nothing(filled):
    student, teacher = reference.make_rows(500, 6, 5)
    ids = np.arange(500) // 7 * 1_000_003 - 40
    order = np.random.default_rng(0).permutation(500)
    bridges = [filled(student[o], teacher[o], ids[o]).fit("auto") for o in (slice(None), order)]
    assert_same(*bridges, 1e-12)
    assert_same_report(*bridges)


def test_rows_far_from_the_origin_are_as_exact(fit):
    student, teacher = reference.make_rows(300, 7, 5, offset=0.0)
    near = fit(student, teacher, 4, affine=True).projectors[1]
    for shift in (1.0, 1e4):
        far = fit(student + shift, teacher - 3 * shift, 4, affine=True, sizes=[200, 99, 1]).projectors[1]
        np.testing.assert_allclose(far.student, near.student, atol=1e-10)
        np.testing.assert_allclose(far.teacher, near.teacher, atol=1e-10)
        offset = near.offset - shift * near.student.sum(1)
        np.testing.assert_allclose(far.offset, offset, atol=1e-10 * shift)
        np.testing.assert_allclose(far.mean, near.mean - 3 * shift, rtol=1e-14)


def test_rows_far_from_the_origin_without_an_offset(fit):
    student, teacher = (x + 1e4 for x in reference.make_rows(300, 7, 5))
    projector = fit(student, teacher, 4, affine=False).projectors[1]
    wanted = (teacher - teacher.mean(0)) @ projector.teacher.numpy().T
    matrix, _ = reference.least_squares(student, wanted, affine=False)
    np.testing.assert_allclose(projector.student, matrix, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_any_dtype_stay_as_they_are(filled, dtype):
    student, teacher = (torch.from_numpy(x).to(dtype) for x in reference.make_rows(1500, 6, 5))
    wanted = filled(student.double().numpy(), teacher.double().numpy()).fit(4)
    fitter = filled(np.empty((0, 6)), np.empty((0, 5)))
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    grown = [x * 1 for x in leaves]  # as in a forward with a graph
    fitter.update({1: grown[0]}, {1: grown[1]})
    bridge = fitter.fit(4)
    assert_same(bridge, wanted, 1e-13)
    for name in TENSORS:
        tensor = getattr(bridge.projectors[1], name)
        assert tensor.dtype == torch.float64 and not tensor.requires_grad
    for row, before, leaf in zip(grown, (student, teacher), leaves, strict=True):
        assert torch.equal(row, before) and row.grad_fn is not None and row._version == 0
        assert leaf.grad is None
    assert not any(x.requires_grad for x in fitter._sample.rows.values())


# What a bridge can recover


def test_a_model_and_itself_match_exactly(fit):
    rows, _ = reference.make_rows(200, 7, 7)
    bridge = fit(rows, rows, 7)
    h = torch.from_numpy(rows)
    assert losses.mse(bridge.student(h, 1), bridge.teacher(h, 1)).max() < 1e-22
    assert losses.normalized_mse(bridge.student(h, 1), bridge.teacher(h, 1)).max() < 1e-20
    assert bridge.metadata["layers"]["1"]["affine"] is True
    assert bridge.metadata["layers"]["1"]["share"] == pytest.approx([1.0] * 7, abs=1e-12)


def test_a_rotated_and_shifted_copy_is_recovered(fit):
    student, _ = reference.make_rows(200, 7, 7, offset=3.0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0]
    teacher = student @ rotation + 5.0
    bridge = fit(student, teacher, 7)
    projector = bridge.projectors[1]
    assert bridge.metadata["layers"]["1"]["affine"] is True
    np.testing.assert_allclose(projector.student, projector.teacher.numpy() @ rotation.T, atol=1e-10)
    assert reference.mean_squared_error(student, teacher, projector) < 1e-22


def test_a_rotated_copy_needs_no_offset(fit):
    student, _ = reference.make_rows(200, 7, 7)
    student = student - student.mean(0)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0]
    projector = fit(student, student @ rotation, 7, affine=False).projectors[1]
    assert not projector.offset.any()
    np.testing.assert_allclose(projector.student, projector.teacher.numpy() @ rotation.T, atol=1e-10)
    assert reference.mean_squared_error(student, student @ rotation, projector) < 1e-22


def test_what_the_student_does_not_see_is_not_explained(fit):
    rng = np.random.default_rng(0)
    u = rng.normal(size=(30_000, 4))
    student = np.stack([u[:, 0], u[:, 2] + 3**0.5 * rng.normal(size=30_000), rng.normal(size=30_000)], 1)
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    teacher = u * [8, 4, 2, 1] @ rotation + 2.0
    report = fit(student, teacher, 4).metadata["layers"]["1"]
    assert report["share"] == pytest.approx([1.0, 0.0, 0.25, 0.0], abs=0.03)
    assert report["variance"] == pytest.approx([64, 16, 4, 1], rel=0.1)
    # Eq. 30: the third direction is better left out, the second and fourth cost more kept than not.
    assert report["error"] == pytest.approx([65, 1, 17, 19, 20], rel=0.15)


def test_standardized_fit_ignores_the_scale_of_single_dimensions(fit):
    student, teacher = reference.make_rows(300, 6, 5)
    rng = np.random.default_rng(0)
    scales = [10.0 ** rng.uniform(-4, 4, size=x.shape[1]) for x in (student, teacher)]
    plain = fit(student, teacher, 4, standardize=True)
    scaled = fit(student * scales[0], teacher * scales[1], 4, standardize=True)
    for model, rows, scale in (("student", student, scales[0]), ("teacher", teacher, scales[1])):
        wanted = getattr(plain, model)(torch.from_numpy(rows), 1)
        actual = getattr(scaled, model)(torch.from_numpy(rows * scale), 1)
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
    assert_same_report(scaled, plain)
    deviations = teacher.std(0, ddof=1)
    np.testing.assert_allclose(
        plain.projectors[1].teacher * deviations,
        reference.principal_directions(teacher / deviations)[:4],
        atol=1e-9,
    )


# Ill-conditioned rows


def spoilt_rows(constant, dtype=np.float64):
    """300 rows of a student with two copies, a sum, two constant and one outlier dimension."""
    student, teacher = reference.make_rows(300, 6, 5)
    extra = [student[:, 0], student[:, 1], student[:, 2] - student[:, 3], 3e3 + 1e3 * student[:, 4]]
    constants = [np.full(300, constant), np.zeros(300)]
    return np.column_stack([student, *extra, *constants]).astype(dtype), teacher


@pytest.mark.parametrize("sizes", [None, [37, 191, 72], [1] * 300], ids=["whole", "chunks", "rows"])
@pytest.mark.parametrize("constant", [0.1, 1e4 / 3, -7.77])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("affine", FORMS)
def test_degenerate_dimensions_of_the_student_do_no_harm(fit, affine, standardize, constant, sizes):
    student, teacher = spoilt_rows(constant)
    bridge = fit(student, teacher, 5, affine=affine, standardize=standardize, sizes=sizes)
    projector = bridge.projectors[1]
    wanted = (teacher - teacher.mean(0)) @ projector.teacher.numpy().T
    matrix, offset = reference.least_squares(student, wanted, affine)
    least = ((student @ matrix.T + offset - wanted) ** 2).sum(1).mean()
    assert reference.mean_squared_error(student, teacher, projector) < 1.001 * least
    # What training computes, in float32.
    h, t = (torch.from_numpy(x).float() for x in (student, teacher))
    error = (bridge.student(h, 1) - bridge.teacher(t, 1)).double().square().sum(1).mean()
    assert error < 1.01 * least
    assert all(np.isfinite(bridge.metadata["layers"]["1"][name]).all() for name in ("share", "cosine", "mse"))


@pytest.mark.parametrize("sizes", [None, [37, 191, 72]], ids=["whole", "chunks"])
@pytest.mark.parametrize("standardize", [False, True])
def test_constant_dimensions_of_the_teacher_are_no_direction(fit, standardize, sizes):
    student, teacher = reference.make_rows(300, 6, 4)
    padded = np.column_stack([teacher, np.full(300, 0.1), np.full(300, 1e4 / 3)])
    bridge = fit(student, padded, 4, standardize=standardize, sizes=sizes)
    plain = fit(student, teacher, 4, standardize=standardize)
    np.testing.assert_allclose(bridge.projectors[1].teacher[:, :4], plain.projectors[1].teacher, atol=1e-9)
    assert bridge.projectors[1].teacher[:, 4:].abs().max() < 1e-6


def test_fewer_training_rows_than_dimensions(fit):
    student, teacher = reference.make_rows(33, 30, 5)
    bridge = fit(student, teacher, 4, holdout=0.3, affine=True)
    report = bridge.metadata["layers"]["1"]
    assert report["num_rows"] - report["num_held_out"] < 30
    wanted = (teacher - teacher.mean(0)) @ bridge.projectors[1].teacher.numpy().T
    matrix, offset = reference.least_squares(student, wanted, affine=True)
    least = ((student @ matrix.T + offset - wanted) ** 2).sum(1).mean()
    assert reference.mean_squared_error(student, teacher, bridge.projectors[1]) < 1.001 * least
    assert all(np.isfinite(report[name]).all() for name in ("share", "error", "mse", "cosine", "explained"))


# The split


def test_rollouts_are_split_by_their_hash():
    # The first outputs of splitmix64 from state 0 and 1: the same on every machine.
    assert rollout_hash(torch.tensor([0, 1])).tolist() == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]
    hashes = rollout_hash(torch.arange(-10_000, 10_000))
    for share in (0.0, 0.1, 0.5):
        assert float(is_held_out(hashes, share).double().mean()) == pytest.approx(share, abs=0.01)
    assert not (is_held_out(hashes, 0.1) & ~is_held_out(hashes, 0.2)).any()


def test_rows_of_a_rollout_are_never_on_both_sides(fit):
    """Every rollout has a state of its own in both models: only a leak can predict the teacher's."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(40) * 17, 20)
    student, teacher = (np.repeat(rng.normal(size=(40, width)), 20, 0) for width in (40, 3))
    noise = 1e-3 * rng.normal(size=student.shape)
    honest, leaky = (
        fit(student + noise, teacher, 3, ids=given, holdout=0.25).metadata["layers"]["1"]
        for given in (ids, None)
    )
    assert max(honest["share"]) < 0.3
    assert min(leaky["share"]) > 0.99
    assert honest["num_held_out"] == int(is_held_out(rollout_hash(torch.from_numpy(ids)), 0.25).sum())
    assert leaky["num_held_out"] == int(is_held_out(rollout_hash(torch.arange(800)), 0.25).sum())
    assert honest["num_held_out"] % 20 == 0 and leaky["num_held_out"] % 20


# Two processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    output = tmp_path_factory.mktemp("gathered")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(gather_worker.__file__)), str(rank), str(output)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    return output


@pytest.mark.drill
@pytest.mark.parametrize("case", gather_worker.CASES)
def test_two_processes_equal_one(two_ranks, case):
    fitter = gather_worker.fitter_of(case, rank=None)
    wanted = fitter.fit(3)
    bridges = [Bridge.load(two_ranks / f"{case}-{rank}.safetensors") for rank in range(2)]
    assert_same(bridges[0], bridges[1])
    assert bridges[0].metadata == bridges[1].metadata
    for bridge in bridges:
        assert_same(bridge, wanted, 1e-10)
        if case != "constant":  # where the ρ² of a direction without variance is rounding
            assert_same_report(bridge, wanted)
        assert bridge.metadata["num_rows"] == fitter.num_rows == gather_worker.NUM_ROWS


def test_ranks_of_other_widths_are_refused_everywhere(two_ranks):
    for rank in range(2):
        refusal = (two_ranks / f"refused-{rank}").read_text()
        assert "layer 3 was" in refusal and "wide before" in refusal
