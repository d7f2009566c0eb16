"""Layer maps against exact rationals, positions against a python loop, and every refusal."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.foundation.errors import UserError
from oprd.objective.selection import LayerMap, Positions, proportional_layer

# Layers (Eq. 11)


def eq_11(layer: int, num_student: int, num_teacher: int) -> int:
    if num_student == 1:
        return num_teacher
    exact = Fraction(layer - 1, num_student - 1) * (num_teacher - 1)
    return math.floor(exact + Fraction(1, 2)) + 1


@pytest.mark.parametrize("num_student", range(1, 41))
def test_proportional_layer_is_eq_11(num_student):
    for num_teacher in range(1, 41):
        mapped = [proportional_layer(layer, num_student, num_teacher) for layer in range(1, num_student + 1)]
        assert mapped == [eq_11(layer, num_student, num_teacher) for layer in range(1, num_student + 1)]
        assert mapped == sorted(mapped)
        assert mapped[-1] == num_teacher and (num_student == 1 or mapped[0] == 1)
        if num_student == num_teacher:
            assert mapped == list(range(1, num_student + 1))


def test_ties_go_up():
    assert proportional_layer(2, 3, 4) == 3  # 1/2 · 3 = 1.5 → 2, plus 1
    assert proportional_layer(2, 3, 2) == 2  # 1/2 · 1 = 0.5 → 1, where banker's rounding says 0


@pytest.mark.parametrize(
    ("spec", "depths", "pairs"),
    [
        ("all", (3, 3), ((1, 1), (2, 2), (3, 3))),
        ("all", (3, 5), ((1, 1), (2, 3), (3, 5))),
        ("all", (1, 7), ((1, 7),)),
        (" all ", (2, 2), ((1, 1), (2, 2))),
        ("last", (28, 36), ((28, 36),)),
        ("last", (1, 1), ((1, 1),)),
        ("even", (5, 5), ((2, 2), (4, 4))),
        ("odd", (5, 5), ((1, 1), (3, 3), (5, 5))),
        ("every=4", (11, 11), ((4, 4), (8, 8))),
        ("every = 4", (4, 8), ((4, 8),)),
        ("every=1", (2, 4), ((1, 1), (2, 4))),
        ("1,14,28", (28, 36), ((1, 1), (14, 18), (28, 36))),
        ("28, 1 ,\t14", (28, 36), ((1, 1), (14, 18), (28, 36))),
        ("3", (4, 4), ((3, 3),)),
        (3, (4, 4), ((3, 3),)),
        ("14=18,28=36", (28, 36), ((14, 18), (28, 36))),
        (" 28 = 36 , 14= 18 ", (28, 36), ((14, 18), (28, 36))),
        ("1=3,2=3", (2, 3), ((1, 3), (2, 3))),
        ("2=1,1=3", (2, 3), ((1, 3), (2, 1))),
        ("1,14=20", (28, 36), ((1, 1), (14, 20))),
    ],
)
def test_layer_specs(spec, depths, pairs):
    layer_map = LayerMap.parse(spec, *depths)
    assert layer_map.pairs == pairs
    assert layer_map.student_layers == tuple(student for student, _ in pairs)
    assert layer_map.teacher_layers == tuple(sorted({teacher for _, teacher in pairs}))


@pytest.mark.parametrize(
    ("spec", "depths"),
    [
        ("0", (4, 4)),
        ("5", (4, 4)),
        ("1,5", (4, 9)),
        ("0=1", (4, 4)),
        ("1=0", (4, 4)),
        ("4=5", (4, 4)),
        ("1,1", (4, 4)),
        ("1=2,1=3", (4, 4)),
        ("2,2=3", (4, 4)),
        ("even", (1, 4)),
        ("every=5", (4, 4)),
        ("every=0", (4, 4)),
        ("every=", (4, 4)),
        ("every=-1", (4, 4)),
        ("every=x", (4, 4)),
        ("", (4, 4)),
        ("  ", (4, 4)),
        (",", (4, 4)),
        ("1,", (4, 4)),
        ("1,,2", (4, 4)),
        ("-1", (4, 4)),
        ("1.5", (4, 4)),
        ("1:2", (4, 4)),
        ("1=2=3", (4, 4)),
        ("=2", (4, 4)),
        ("1=", (4, 4)),
        ("1 2", (4, 4)),
        ("first", (4, 4)),
        ("all,last", (4, 4)),
        ("[1, 2]", (4, 4)),
    ],
)
def test_bad_layer_specs_are_refused(spec, depths):
    with pytest.raises(UserError, match="layers="):
        LayerMap.parse(spec, *depths)


# Positions


def selected(spec: str, row: list[bool]) -> list[bool]:
    """The rows of one rollout that `spec` picks, counted by hand over its supervised rows."""
    supervised = [index for index, keep in enumerate(row) if keep]
    kind, _, count = spec.partition("=")
    k = int(count) if count else {"all": len(row), "last": 1}[kind]
    chosen = supervised[:k] if kind == "first" else supervised[max(0, len(supervised) - k) :]
    return [index in chosen for index in range(len(row))]


MASKS = st.integers(0, 9).flatmap(
    lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=4)
)
SPECS = st.sampled_from(["all", "last"]) | st.builds(
    "{}={}".format, st.sampled_from(["first", "last"]), st.integers(1, 11)
)


@settings(max_examples=200, deadline=None)
@given(rows=MASKS, spec=SPECS)
def test_positions_are_those_of_a_python_loop(rows, spec):
    response = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), -1)
    before = response.clone()
    mask = Positions.parse(spec).mask(response)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [selected(spec, row) for row in rows]
    assert torch.equal(response, before)


@pytest.mark.parametrize(
    ("spec", "picked"),
    [
        ("all", [[0, 1, 4, 5], [0], []]),
        ("last", [[5], [0], []]),
        ("last=1", [[5], [0], []]),
        ("last=3", [[1, 4, 5], [0], []]),
        (" last = 3 ", [[1, 4, 5], [0], []]),
        ("first=3", [[0, 1, 4], [0], []]),
        ("first=1", [[0], [0], []]),
        ("first=99", [[0, 1, 4, 5], [0], []]),
        ("last=2000000", [[0, 1, 4, 5], [0], []]),
        ("last=" + "9" * 30, [[0, 1, 4, 5], [0], []]),
        ("first=" + "9" * 30, [[0, 1, 4, 5], [0], []]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_tool_holes_and_padding_never_count(spec, picked, dtype):
    # A tool call in rows 2–3 and padding from 6; a rollout of one token; one without supervised rows.
    response = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 0], [0] * 7], dtype=dtype)
    mask = Positions.parse(spec).mask(response)
    assert [row.nonzero().flatten().tolist() for row in mask] == picked


@pytest.mark.parametrize("spec", ["last=0", "first=0", "first=-1", "last=-1", "last=x", "last=", "first"])
def test_positions_without_a_row_are_refused(spec):
    with pytest.raises(UserError, match="positions"):
        Positions.parse(spec)


@pytest.mark.parametrize("spec", ["", " ", "5", "middle", "all=3", "last=1.5", "last:5", "last=5,first=5"])
def test_unreadable_positions_are_refused(spec):
    with pytest.raises(UserError, match="positions"):
        Positions.parse(spec)
