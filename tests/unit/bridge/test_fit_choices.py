"""What a fit decides and reports from held-out rows, against NumPy; layer maps; every refusal."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference_fit as reference
from oprd.bridge import BridgeFitter
from oprd.bridge.artifact import TENSORS
from oprd.bridge.fitter import best_monotone
from oprd.bridge.held_out import is_held_out, rollout_hash
from oprd.foundation.errors import UserError
from oprd.objective.selection import LayerMap

ONE = LayerMap(((1, 1),))


def split(ids, share=0.1):
    return is_held_out(rollout_hash(torch.as_tensor(ids)), share).numpy()


def tensors(*arrays):
    return [torch.from_numpy(x) for x in arrays]


def held_out_error(student, teacher, held_out, affine):
    return reference.report(student, teacher, held_out, affine)["mse"][-1]


# The report


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("affine", [False, True, None])
@pytest.mark.parametrize(("student_width", "teacher_width"), [(7, 5), (4, 9), (1, 1)])
def test_report_is_that_of_all_rows_at_once(fit, student_width, teacher_width, affine, offset):
    student, teacher = reference.make_rows(700, student_width, teacher_width, seed=4, offset=offset)
    ids = np.arange(700) // 9
    held_out = split(ids, 0.2)
    rank = min(3, teacher_width)
    bridge = fit(student, teacher, rank, ids=ids, sizes=[333, 0, 367], affine=affine, holdout=0.2)
    errors = {form: held_out_error(student, teacher, held_out, form) for form in (False, True)}
    chosen = min(errors, key=errors.get) if affine is None else affine
    wanted = reference.report(student, teacher, held_out, chosen) | {"cka": reference.cka(student, teacher)}

    assert bridge.metadata["num_rows"] == 700 and bridge.metadata["rank"] == rank
    report = bridge.metadata["layers"]["1"]
    assert report["num_rows"] == 700 and report["num_held_out"] == held_out.sum()
    assert (report["teacher_layer"], report["rank"]) == (1, rank)
    assert report["directions"] == list(range(rank))
    assert report["affine"] is chosen
    for name, value in wanted.items():
        np.testing.assert_allclose(report[name], value, rtol=2e-6, atol=1e-9, err_msg=name)
    assert report["cosine_at_rank"] == pytest.approx(wanted["cosine"][rank - 1], rel=1e-6)
    # Before the fit: a random P_S, so no better than predicting nothing.
    assert len(report["mse_before"]) == len(report["cosine_before"]) == teacher_width
    assert min(report["mse_before"]) > 0 and report["mse_before"][0] > report["mse"][0]
    assert np.abs(report["cosine_before"]).max() < report["cosine_at_rank"]
    assert json.loads(json.dumps(bridge.metadata)) == bridge.metadata


def test_report_stops_at_max_rank(fit):
    student, teacher = reference.make_rows(300, 7, 9)
    whole = fit(student, teacher, 2).metadata["layers"]["1"]
    short = fit(student, teacher, 2, max_rank=4).metadata["layers"]["1"]
    for name, length in (("mse", 4), ("cosine", 4), ("error", 5), ("explained", 4)):
        assert short[name] == whole[name][:length], name
    assert len(short["mse_before"]) == len(short["cosine_before"]) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_standardized_cosines_do_not_depend_on_the_dtype(filled, dtype):
    """Rows of which one dimension is so small that its scale overflows float16."""
    student, teacher = reference.make_rows(300, 6, 5)
    student = np.column_stack([student, 3e-6 * np.random.default_rng(0).normal(size=300)])
    rows = [torch.from_numpy(x).to(dtype).double().numpy() for x in (student, teacher)]
    narrow, wide = (
        filled(*rows, dtype=kind, standardize=True).fit(3).metadata["layers"]["1"]
        for kind in (dtype, torch.float64)
    )
    for name in ("share", "mse", "cosine", "cosine_at_rank"):
        np.testing.assert_allclose(narrow[name], wide[name], rtol=1e-6, err_msg=name)


def test_cosines_of_many_rows_come_from_a_sample(fit):
    student, teacher = reference.make_rows(6000, 5, 4)
    held_out = split(np.arange(6000), 0.5)
    report = fit(student, teacher, 4, holdout=0.5).metadata["layers"]["1"]
    assert report["num_held_out"] == held_out.sum() > 2 * 1024
    wanted = reference.report(student, teacher, held_out, affine=report["affine"])["cosine"]
    np.testing.assert_allclose(report["cosine"], wanted, atol=0.03)
    streamed = fit(student, teacher, 4, holdout=0.5, sizes=[100] * 60).metadata["layers"]["1"]
    np.testing.assert_allclose(streamed["cosine"], report["cosine"], rtol=1e-6)


def test_offset_is_chosen_by_the_held_out_error(fit):
    student, teacher = reference.make_rows(400, 6, 5, offset=2.0)
    assert fit(student, teacher, 3).metadata["layers"]["1"]["affine"] is True
    chosen = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        student = rng.normal(size=(60, 6))
        teacher = student[:, :5] + rng.normal(size=(60, 5))
        held_out = split(np.arange(60), 0.3)
        errors = {form: held_out_error(student, teacher, held_out, form) for form in (False, True)}
        affine = fit(student, teacher, 3, holdout=0.3).metadata["layers"]["1"]["affine"]
        assert affine is min(errors, key=errors.get)
        chosen.add(affine)
    assert chosen == {False, True}


# Rank and directions


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), width=st.integers(2, 9), cap=st.sampled_from([1, 2, 4, 256]))
def test_automatic_rank_is_least_in_eq_30(fit, seed, width, cap):
    student, teacher = reference.make_rows(200, width, width, seed)
    curve = reference.report(student, teacher, split(np.arange(200)), affine=True)["error"][: cap + 1]
    bridge = fit(student, teacher, "auto", affine=True, max_rank=cap)
    assert bridge.ranks == {1: int(curve.argmin())} and bridge.metadata["rank"] == "auto"
    assert bridge.metadata["layers"]["1"]["rank"] == curve.argmin() <= cap
    fixed = fit(student, teacher, bridge.ranks[1], affine=True)
    assert torch.equal(fixed.projectors[1].student, bridge.projectors[1].student)


def deep_fitter(**options):
    """Student layer 1 knows nothing of its teacher, layer 2 nearly everything."""
    student, teacher = tensors(*reference.make_rows(600, 5, 5))
    noise = torch.from_numpy(np.random.default_rng(9).normal(size=(600, 5)))
    fitter = BridgeFitter(LayerMap(((1, 1), (2, 3))), affine=True, **options)
    fitter.update({1: noise, 2: student}, {1: teacher, 3: teacher})
    return fitter


def test_a_layer_without_a_predictable_direction_is_dropped(caplog):
    with caplog.at_level(logging.WARNING):
        bridge = deep_fitter().fit("auto")
    assert bridge.layer_map.pairs == ((2, 3),) and bridge.metadata["dropped_layers"] == [1]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "layer 1" in caplog.text and "dropped" in caplog.text
    dropped = bridge.metadata["layers"]["1"]
    assert (dropped["rank"], dropped["directions"], dropped["cosine_at_rank"]) == (0, [], None)
    assert min(dropped["error"]) == dropped["error"][0]


@pytest.mark.parametrize("directions", ["leading", "predictable"])
def test_a_bridge_without_a_layer_is_refused(directions):
    fitter = deep_fitter(directions=directions)
    with pytest.raises(UserError, match="no student layer"):
        fitter.fit("auto", layer_map=ONE)
    assert fitter.fit(2, layer_map=ONE).ranks == {1: 2}  # a rank of one's own is kept


def uneven_rows():
    """Teacher coordinates of falling variance; the student sees the second, the fourth and half the fifth."""
    rng = np.random.default_rng(0)
    u = rng.normal(size=(3000, 6))
    noise = rng.normal(size=(3000, 6)) * [9, 0.1, 9, 0.2, 1.2, 9]
    return (u + noise) @ rng.normal(size=(6, 6)), u * [6, 5, 4, 3, 2, 1] + 1.0


@pytest.mark.parametrize("cap", [1, 256])
def test_predictable_directions(fit, cap):
    student, teacher = uneven_rows()
    bridge = fit(student, teacher, "auto", directions="predictable", affine=True, max_rank=cap)
    wanted = reference.report(student, teacher, split(np.arange(3000)), affine=True)
    kept = np.flatnonzero(wanted["share"] >= 0.5)[:cap]
    assert bridge.metadata["layers"]["1"]["directions"] == kept.tolist() == [1, 3][:cap]
    np.testing.assert_allclose(
        bridge.projectors[1].teacher, reference.principal_directions(teacher)[kept], atol=1e-9
    )
    cosine = reference.report(student, teacher, split(np.arange(3000)), True, kept)["cosine"][-1]
    assert bridge.metadata["layers"]["1"]["cosine_at_rank"] == pytest.approx(cosine, rel=1e-6)


@pytest.mark.parametrize("rank", range(1, 7))
def test_a_number_of_predictable_directions(fit, rank):
    student, teacher = uneven_rows()
    wanted = reference.report(student, teacher, split(np.arange(3000)), affine=True)
    gain = wanted["variance"] * (2 * np.clip(wanted["share"], 0, 1) - 1)
    bridge = fit(student, teacher, rank, directions="predictable", affine=True)
    assert bridge.metadata["layers"]["1"]["directions"] == sorted(np.argsort(-gain)[:rank])


def test_shared_directions_of_a_measured_fit_see_no_held_out_row(fit):
    """A student wide enough to learn its rows by heart: honest directions predict nothing."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(130, 60)), rng.normal(size=(130, 5))
    report = fit(student, teacher, 3, method="rrr", holdout=0.3, affine=True).metadata["layers"]["1"]
    assert max(report["share"]) < 0.2
    assert max(np.abs(report["cosine"])) < 0.5


def test_other_settings_fit_the_same_rows(filled):
    student, teacher = reference.make_rows(300, 6, 5)
    fitter = filled(student, teacher, affine=True)
    rrr = fitter.fit(3, settings=replace(fitter.settings, method="rrr"))
    wanted = filled(student, teacher, affine=True, method="rrr").fit(3)
    for name in TENSORS:
        assert torch.equal(getattr(rrr.projectors[1], name), getattr(wanted.projectors[1], name))
    assert rrr.metadata["fit"]["method"] == "rrr" and rrr.metadata == wanted.metadata
    assert fitter.fit(3).metadata["fit"]["method"] == "pca"
    assert fitter.fit(5).first(3).ranks == fitter.fit(3).ranks


# Layer maps and CKA

PLANTED = {1: 2, 2: 2, 3: 4, 5: 5}  # student layer: teacher layer


def planted_fitter(plan, all_pairs=True, **options):
    """A student whose layers each show another of a teacher's five unrelated layers, with noise."""
    rng = np.random.default_rng(0)
    teacher = {layer: rng.normal(size=(400, 3)) + 1.0 for layer in range(1, 6)}
    student = {s: teacher[t] @ rng.normal(size=(3, 4)) + 0.3 * rng.normal(size=(400, 4)) for s, t in plan}
    pairs = LayerMap(tuple((s, t) for s, t in plan))
    layers = range(1, 6) if all_pairs else ()
    fitter = BridgeFitter(pairs, all_pairs=all_pairs, teacher_layers=layers, **options)
    fitter.update(*({k: torch.from_numpy(x) for k, x in rows.items()} for rows in (student, teacher)))
    return fitter, student, teacher


@pytest.mark.parametrize("options", [{}, {"standardize": True}, {"method": "rrr"}], ids=str)
def test_best_layer_map_finds_a_planted_one(options):
    fitter, *_ = planted_fitter(PLANTED.items(), **options)
    assert fitter.best_layer_map() == LayerMap(tuple(PLANTED.items()))
    assert fitter.fit(2, layer_map=fitter.best_layer_map()).layer_map.pairs == tuple(PLANTED.items())


def test_best_layer_map_keeps_depths_in_order():
    fitter, *_ = planted_fitter([(1, 2), (2, 4), (3, 3), (4, 5)])  # 4 before 3: one of them has to give
    assert fitter.best_layer_map().pairs[0] == (1, 2) and fitter.best_layer_map().pairs[3] == (4, 5)
    teachers = [teacher for _, teacher in fitter.best_layer_map().pairs]
    assert teachers == sorted(teachers) and len({4, 3} & set(teachers[1:3])) == 1


def test_best_layer_map_weighs_dimensions_as_the_fit_does():
    """Every student layer shows teacher layer 2's huge dimension, and the five others of its own layer."""
    rng = np.random.default_rng(0)
    huge = 1e3 * rng.normal(size=(400, 1))
    blurs = {1: 300.0, 2: 0.0, 3: 300.0}
    teacher = {
        layer: np.hstack([rng.normal(size=(400, 5)), huge + blur * rng.normal(size=(400, 1))])
        for layer, blur in blurs.items()
    }
    student = {layer: np.hstack([teacher[layer][:, :5], huge]) for layer in (1, 3)}
    for standardize, pairs in ((False, ((1, 2), (3, 2))), (True, ((1, 1), (3, 3)))):
        own = LayerMap(((1, 1), (3, 3)))
        fitter = BridgeFitter(own, all_pairs=True, teacher_layers=[1, 2, 3], standardize=standardize)
        fitter.update(*({k: torch.from_numpy(x) for k, x in rows.items()} for rows in (student, teacher)))
        assert fitter.best_layer_map().pairs == pairs


def test_best_layer_map_stays_among_accumulated_pairs():
    fitter, *_ = planted_fitter([(1, 2), (2, 4)], all_pairs=False)
    assert fitter.best_layer_map().pairs == ((1, 2), (2, 4))


def test_best_layer_map_that_cannot_be_in_order_is_refused():
    fitter, *_ = planted_fitter([(1, 4), (2, 2)], all_pairs=False)
    with pytest.raises(UserError, match="all_pairs"):
        fitter.best_layer_map()


SCORES = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(-9, 9), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@settings(max_examples=150, deadline=None)
@given(scores=SCORES)
def test_best_monotone_is_the_best_of_all(scores):
    chosen = best_monotone(scores)
    assert len(chosen) == len(scores) and chosen == sorted(chosen)
    total = sum(row[j] for row, j in zip(scores, chosen, strict=True))
    assert total == reference.best_monotone_sum(scores)


def test_cka_of_all_pairs_is_that_of_the_kernels():
    fitter, student, teacher = planted_fitter(PLANTED.items())
    actual = fitter.cka()
    assert set(actual) == {(s, t) for s in student for t in teacher}
    for (s, t), value in actual.items():
        assert value == pytest.approx(reference.cka(student[s], teacher[t]), abs=1e-12)
        assert (value > 0.5) == (PLANTED[s] == t)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), width=st.integers(1, 7), scale=st.floats(1e-3, 1e3))
def test_cka_ignores_rotation_shift_scale_and_side(filled, seed, width, scale):
    student, teacher = reference.make_rows(60, width, 5, seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    value = filled(student, teacher).cka()[1, 1]
    assert 0 < value <= 1
    assert filled(teacher, student).cka()[1, 1] == pytest.approx(value, abs=1e-12)
    moved = scale * (student @ rotation) + 3.0
    assert filled(moved, teacher).cka()[1, 1] == pytest.approx(value, abs=1e-9)
    assert filled(moved, student).cka()[1, 1] == pytest.approx(1.0, abs=1e-9)


# Refusals: each says what is wrong, and the fitter is as before.


@pytest.fixture
def ready():
    """A fitter of layers 1=2 and 3=2 that has seen 100 rows of widths 6, 6 and 5."""
    fitter = BridgeFitter(LayerMap(((1, 2), (3, 2))))
    fitter.update(*good_rows())
    return fitter


def good_rows(count=100):
    student, teacher = tensors(*reference.make_rows(count, 6, 5, seed=1))
    return {1: student, 3: student + 1}, {2: teacher}


def spoilt(change):
    student, teacher = good_rows()
    ids = change(student, teacher)
    return student, teacher, ids


def put(rows, layer, value):
    rows[layer] = rows[layer].clone()
    rows[layer][7, 2] = value


BAD_UPDATES = {
    "missing student layer": (lambda s, t: (s.pop(3), None)[1], "student's layer 3"),
    "missing teacher layer": (lambda s, t: (t.pop(2), None)[1], "teacher's layer 2"),
    "fewer rows": (lambda s, t: t.update({2: t[2][:99]}), "same rows"),
    "more rows": (lambda s, t: s.update({3: s[3][[0, *range(100)]]}), "same rows"),
    "not a matrix": (lambda s, t: t.update({2: t[2][None]}), "shape"),
    "wider": (lambda s, t: s.update({3: s[3][:, [0, *range(6)]]}), "6 wide before and is now 7"),
    "narrower": (lambda s, t: t.update({2: t[2][:, 1:]}), "5 wide before and is now 4"),
    "nan": (lambda s, t: put(s, 1, np.nan), "student's layer 1.*finite"),
    "inf": (lambda s, t: put(t, 2, -np.inf), "teacher's layer 2.*finite"),
    "too few ids": (lambda s, t: list(range(99)), r"rollout_ids.*\(99,\).*100 rows"),
    "too many ids": (lambda s, t: torch.arange(101), r"rollout_ids.*\(101,\).*100 rows"),
    "ids of two columns": (lambda s, t: torch.zeros(100, 2, dtype=torch.long), "rollout_ids"),
    "ids that are text": (lambda s, t: ["prompt 1"] * 100, "rollout_ids"),
    "ids that are fractions": (lambda s, t: [i / 100 for i in range(100)], "rollout_ids"),
}


@pytest.mark.parametrize("name", BAD_UPDATES)
def test_bad_rows_are_refused_and_leave_no_trace(ready, name):
    change, message = BAD_UPDATES[name]
    before = ready.fit(3)
    with pytest.raises(UserError, match=message):
        ready.update(*spoilt(change))
    after = ready.fit(3)
    assert ready.num_rows == 100 and after.metadata == before.metadata
    for layer in (1, 3):
        for tensor in TENSORS:
            assert torch.equal(*(getattr(x.projectors[layer], tensor) for x in (before, after)))


def test_a_refused_first_update_leaves_no_trace():
    fitter = BridgeFitter(ONE)
    for bad in ({"rollout_ids": [1, 2]}, {"rollout_ids": torch.zeros(9, 9)}):
        with pytest.raises(UserError, match="rollout_ids"):
            fitter.update({1: torch.randn(9, 3)}, {1: torch.randn(9, 2)}, **bad)
    student, teacher = reference.make_rows(50, 6, 5)
    fitter.update({1: torch.from_numpy(student)}, {1: torch.from_numpy(teacher)})
    assert fitter.fit(5).ranks == {1: 5}


def test_an_empty_update_changes_nothing(ready):
    before = ready.fit(3)
    for ids in (None, [], torch.empty(0, dtype=torch.long)):
        ready.update({1: torch.empty(0, 6), 3: torch.empty(0, 6)}, {2: torch.empty(0, 5)}, ids)
    assert ready.num_rows == 100 and ready.fit(3).metadata == before.metadata
    assert torch.equal(ready.fit(3).projectors[3].student, before.projectors[3].student)


@pytest.mark.parametrize("rank", [0, -1, 1.0, 2.5, "foo", "3", None])
def test_what_is_no_rank_is_refused(ready, rank):
    with pytest.raises(UserError, match="rank"):
        ready.fit(rank)


def test_a_rank_above_the_teachers_width_is_refused(ready):
    assert ready.fit(5).ranks == {1: 5, 3: 5}
    with pytest.raises(UserError, match=r"rank 6.*5 directions"):
        ready.fit(6)


def test_too_few_rows_are_refused(filled):
    student, teacher = reference.make_rows(6, 6, 5)
    with pytest.raises(UserError, match=r"6 rows.*at least 7"):
        filled(student, teacher).fit(2)
    fitter = filled(student, teacher)
    fitter.update({1: torch.randn(1, 6)}, {1: torch.randn(1, 5)})
    assert fitter.fit(2).ranks == {1: 2}


@pytest.mark.parametrize("method", ["fit", "best_layer_map", "cka"])
def test_nothing_can_be_made_of_no_rows(method):
    with pytest.raises(UserError, match="0 rows"):
        getattr(BridgeFitter(ONE), method)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "cca"}, "method.*cca.*pca, rrr"),
        ({"directions": "best"}, "directions.*best.*leading, predictable"),
        ({"max_rank": 0}, "max_rank"),
        ({"holdout": 1.0}, "holdout"),
        ({"holdout": -0.1}, "holdout"),
        ({"holdout": float("nan")}, "holdout"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        BridgeFitter(ONE, **options)


def test_fitters_that_differ_cannot_be_merged(ready):
    other = BridgeFitter(LayerMap(((1, 2), (3, 3))))
    with pytest.raises(UserError, match="layers"):
        ready.merge(other)
    wider = BridgeFitter(LayerMap(((1, 2), (3, 2))))
    student, teacher = good_rows()
    wider.update(student, {2: torch.cat([teacher[2]] * 2, 1)})
    with pytest.raises(UserError, match="5 wide before and is now 10"):
        ready.merge(wider)
    uneven = BridgeFitter(LayerMap(((1, 2), (3, 2))), holdout=0.5)  # would put a rollout on both sides
    uneven.update(*good_rows())
    with pytest.raises(UserError, match=r"held out|holdout"):
        ready.merge(uneven)
    assert ready.num_rows == 100
    ready.merge(BridgeFitter(LayerMap(((1, 2), (3, 2)))))  # one that has seen nothing
    assert ready.num_rows == 100 and ready.fit(2).ranks == {1: 2, 3: 2}


@pytest.mark.parametrize("ids", [None, [7] * 100], ids=["nothing held out", "one rollout"])
def test_without_held_out_rows_only_a_number_is_a_rank(filled, ids):
    student, teacher = reference.make_rows(100, 6, 5)
    fitter = filled(student, teacher, ids, holdout=0 if ids is None else 0.1)
    with pytest.raises(UserError, match="held-out rows"):
        fitter.fit("auto")
    with pytest.raises(UserError, match="held-out rows"):
        fitter.fit(2, settings=replace(fitter.settings, directions="predictable"))
    with pytest.raises(UserError, match="held-out"):
        fitter.best_layer_map()
    bridge = fitter.fit(3)
    report = bridge.metadata["layers"]["1"]
    assert bridge.ranks == {1: 3} and report["affine"] is True and report["num_held_out"] == 0
    assert report["share"] is report["error"] is report["cosine"] is report["cosine_at_rank"] is None
    np.testing.assert_allclose(
        bridge.projectors[1].teacher, reference.principal_directions(teacher)[:3], atol=1e-9
    )
    assert json.loads(json.dumps(bridge.metadata)) == bridge.metadata


def test_pairs_that_were_not_accumulated_are_refused(ready):
    with pytest.raises(UserError, match="1=3"):
        ready.fit(2, layer_map=LayerMap(((1, 3),)))


def test_a_layer_that_never_varies_gives_a_plain_report(fit):
    student, _ = reference.make_rows(200, 6, 5)
    teacher = np.ones((200, 3))
    with pytest.raises(UserError, match="no student layer"):
        fit(student, teacher, "auto")
    report = fit(student, teacher, 2).metadata["layers"]["1"]
    assert np.isfinite(report["explained"]).all() and np.isfinite(report["mse"]).all()


def test_the_sample_is_of_rows_of_all_held_out_rollouts(filled):
    """Rollouts longer than the sample must not crowd one another out of it."""
    ids, rng = np.repeat(np.arange(40) * 17, 2000), np.random.default_rng(0)
    student = np.stack([ids.astype(float), *rng.normal(size=(2, len(ids)))], axis=1)
    teacher = rng.normal(size=(len(ids), 2))
    sizes = [777] * (len(ids) // 777) + [len(ids) % 777]
    samples = [
        filled(student, teacher, ids=ids, holdout=0.25, **options)._sample.rows["student", 1]
        for options in ({}, {"sizes": sizes})
    ]
    assert torch.equal(*samples)
    found, counts = samples[0][:, 0].unique(return_counts=True)
    assert set(found.tolist()) == set(ids[split(ids, 0.25)].tolist())
    assert counts.max() < 2.5 * counts.min()
