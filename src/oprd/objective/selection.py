"""Which layers are matched (Eq. 11) and which response rows are supervised."""

import re
from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor

from oprd.foundation.errors import UserError

LAYER_FORMS = "'all', 'last', 'even', 'odd', 'every=4', '1,14,28' or '14=18,28=36'"
MOST_ROWS = 2**63 - 1  # that tensors can count
POSITION_FORMS = "'all', 'last', 'last=2000' or 'first=50'"


def proportional_layer(student_layer: int, num_student: int, num_teacher: int) -> int:
    """Teacher layer at the same relative depth (Eq. 11), in integers, ties up.

    φ(l) = round((l − 1)/(L_S − 1) · (L_T − 1)) + 1, and L_T when the student has a single layer.
    """
    if num_student == 1:
        return num_teacher
    steps = num_student - 1
    return (2 * (student_layer - 1) * (num_teacher - 1) + steps) // (2 * steps) + 1


@dataclass(frozen=True)
class LayerMap:
    """Pairs of (student layer, teacher layer), 1-based, in ascending order of the student layer.

    Layer l is the output of block l; l = L is taken after the final norm (Hugging Face's
    `hidden_states[L]`) unless `final_norm` is false. `explicit` are the student layers whose
    teacher layer was written out rather than mapped by Eq. 11.
    """

    pairs: tuple[tuple[int, int], ...]
    explicit: frozenset[int] = field(default=frozenset(), compare=False)

    @classmethod
    def parse(cls, spec: str, num_student: int, num_teacher: int) -> "LayerMap":
        """Read a `layers` spec for models of `num_student` and `num_teacher` blocks.

        A form that names student layers only is mapped by Eq. 11. Raises `UserError` on a layer out
        of range, a student layer named twice, an empty selection or an unknown form.
        """
        spec = str(spec).strip()
        items = _items(spec, num_student)
        pairs = [_pair(item, spec, num_student, num_teacher) for item in items]
        if not pairs:
            raise UserError(f"layers={spec!r} selects no layer of a student with {num_student} layers")
        students = [student for student, _ in pairs]
        if repeated := sorted({layer for layer in students if students.count(layer) > 1}):
            raise UserError(f"layers={spec!r} names student layer {repeated[0]} twice; name each once")
        explicit = frozenset(student for item, student in zip(items, students, strict=True) if "=" in item)
        return cls(tuple(sorted(pairs)), explicit)

    @property
    def student_layers(self) -> tuple[int, ...]:
        """The student's layers, ascending."""
        return tuple(student for student, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """The distinct teacher layers, ascending."""
        return tuple(sorted({teacher for _, teacher in self.pairs}))


def _items(spec: str, num_student: int) -> list[str]:
    """The comma-separated layers that a spec stands for."""
    first_and_step = {"all": (1, 1), "last": (num_student, 1), "even": (2, 2), "odd": (1, 2)}
    if every := re.fullmatch(r"every\s*=\s*(\d+)", spec):
        step = int(every[1])
        if step < 1:
            raise UserError(f"layers={spec!r}: the step must be at least 1")
        first_and_step[spec] = (step, step)
    if spec not in first_and_step:
        return spec.split(",")
    first, step = first_and_step[spec]
    return [str(layer) for layer in range(first, num_student + 1, step)]


def _pair(item: str, spec: str, num_student: int, num_teacher: int) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)\s*(?:=\s*(\d+)\s*)?", item)
    if not match:
        raise UserError(f"layers={spec!r}: cannot read {item.strip()!r}; write {LAYER_FORMS}")
    student = _in_range(int(match[1]), num_student, "student", spec)
    if match[2] is None:
        return student, proportional_layer(student, num_student, num_teacher)
    return student, _in_range(int(match[2]), num_teacher, "teacher", spec)


def _in_range(layer: int, depth: int, model: str, spec: str) -> int:
    if not 1 <= layer <= depth:
        raise UserError(
            f"layers={spec!r}: the {model} has layers 1 to {depth}, and layer {layer} is not one of them"
        )
    return layer


@dataclass(frozen=True)
class Positions:
    """Which supervised response rows enter a loss: all of them, the first k or the last k."""

    kind: str
    count: int = 0

    @classmethod
    def parse(cls, spec: str, key: str = "positions") -> "Positions":
        """Read `all`, `last` (= `last=1`), `last=k` or `first=k`; else a `UserError` that names `key`."""
        text = str(spec).strip()
        match = re.fullmatch(r"(all|last)|(last|first)\s*=\s*(\d+)", text)
        if not match:
            raise UserError(f"cannot read {key} {text!r}; write {POSITION_FORMS}")
        if match[1]:
            return cls(match[1], int(match[1] == "last"))
        if int(match[3]) < 1:
            raise UserError(f"{key} {text!r} select no row; k must be at least 1")
        return cls(match[2], min(int(match[3]), MOST_ROWS))

    def mask(self, response_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """The rows of `response_mask` that are selected; rows outside it neither count nor appear."""
        supervised = response_mask.bool()
        if self.kind == "all":
            return supervised
        if self.kind == "first":
            rank = supervised.long().cumsum(-1)
        else:
            rank = supervised.long().flip(-1).cumsum(-1).flip(-1)
        return supervised & (rank <= self.count)
