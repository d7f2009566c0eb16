"""Which positions of a student's and a teacher's response have read the same bytes, under two tokenizers."""

from codecs import utf_8_decode
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from oprd.spelling import Spelling, encode, end_of_turn, same_vocabulary, spelling

Ids = Iterable[int]
Pairs = list[tuple[int, int]]

NOTHING = -1  # an id that is no token


def align_tokens(
    student_tokenizer: Tokenizer, student_ids: Ids, teacher_tokenizer: Tokenizer, teacher_ids: Ids
) -> Pairs:
    """Pairs (i, j), 0-based: `student_ids[:i+1]` and `teacher_ids[:j+1]` spell the same bytes.

    Strictly increasing and as many as there can be. An end token (EOS or end of turn) in last place pairs
    with the other's, if all before it agrees; other special tokens spell their name where the other response
    spells it, and nothing elsewhere. Nothing pairs beyond the first difference or the student's first invalid
    UTF-8. Equal ids of one vocabulary pair one to one; else a tokenizer without bytes raises `UserError`.
    """
    student_ids, teacher_ids = _as_list(student_ids), _as_list(teacher_ids)
    if student_ids == teacher_ids and same_vocabulary(student_tokenizer, teacher_tokenizer):
        return [(i, i) for i in range(len(student_ids))]
    student, teacher = spelling(student_tokenizer, "student"), spelling(teacher_tokenizer, "teacher")
    return _most_pairs(student, student_ids, teacher, teacher_ids)


def row_pairs(pairs: Pairs, num_student: int, num_teacher: int) -> Pairs:
    """Token pairs as rows: (i, j) gives (i+1, j+1), the rows that have read them, and (0, 0) always pairs."""
    rows = [(0, 0), *((i + 1, j + 1) for i, j in pairs)]
    return [(i, j) for i, j in rows if i < num_student and j < num_teacher]


@dataclass(frozen=True)
class AlignedResponse:
    """A student's response in the teacher's tokens, which end where the student's bytes are invalid UTF-8."""

    teacher_ids: list[int]
    rows: Pairs  # (student, teacher) rows that have read the same
    num_rows: int  # the student's
    invalid_utf8: bool
    ends_together: bool = False  # all has been read, and the end tokens pair

    @property
    def coverage(self) -> float:
        """The share of the student's rows that are paired; 0 without rows."""
        return len(self.rows) / self.num_rows if self.num_rows else 0.0


class Aligner:
    """Hands a student's responses to a teacher; `UserError` if one must, but cannot, be read as bytes."""

    def __init__(self, student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> None:
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.same_vocabulary = same_vocabulary(student_tokenizer, teacher_tokenizer)
        if not self.same_vocabulary:
            for tokenizer, role in (student_tokenizer, "student"), (teacher_tokenizer, "teacher"):
                spelling(tokenizer, role)

    def align(self, student_ids: Ids) -> AlignedResponse:
        """The student's own ids under one vocabulary, else the teacher's tokenization of the same text.

        That text has no special tokens and stops at invalid UTF-8; the teacher ends where the student did.
        """
        ids = _as_list(student_ids)
        if self.same_vocabulary:
            rows = [(t, t) for t in range(len(ids))]
            return AlignedResponse(ids, rows, len(ids), invalid_utf8=False, ends_together=True)
        student = spelling(self.student_tokenizer, "student")
        plain = [NOTHING if i in student.controls else i for i in ids]
        if ids and ids[-1] in student.ends:
            plain[-1] = ids[-1]
        response = _Response(student, plain, student.drops_space[0])
        text, valid = _decode(response.text, response.ended)
        teacher_ids = encode(self.teacher_tokenizer, text) if text else []
        end = end_of_turn(self.teacher_tokenizer)
        if response.ended and valid == len(response.text) and end is not None:
            teacher_ids.append(end)
        pairs = _most_pairs(student, plain, spelling(self.teacher_tokenizer, "teacher"), teacher_ids)
        rows = row_pairs(pairs, len(ids), len(teacher_ids))
        ends = response.ended and pairs[-1:] == [(len(ids) - 1, len(teacher_ids) - 1)]
        return AlignedResponse(teacher_ids, rows, len(ids), valid < len(response.text), ends)


def _as_list(ids: Ids) -> list[int]:
    return [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]


class _Response:
    """What a response spells before its end token, and a walk along its text and control tokens."""

    def __init__(self, spelled_by: Spelling, ids: list[int], drops_space: bool) -> None:
        self.ended = bool(ids) and ids[-1] in spelled_by.ends
        ids = ids[: len(ids) - self.ended]
        self.spelled = [spelled_by.text.get(i, b"") for i in ids]
        first = next((n for n, piece in enumerate(self.spelled) if piece), None)
        if drops_space and first is not None:
            self.spelled[first] = self.spelled[first].removeprefix(b" ")
        self.text, self.at = b"".join(self.spelled), 0
        stops = zip(accumulate(map(len, self.spelled)), range(len(ids)), ids, strict=True)
        controls = [(stop, n, spelled_by.controls[i]) for stop, n, i in stops if i in spelled_by.controls]
        self.last = {(stop, name): n for stop, n, name in controls}
        self.ahead = controls[::-1]

    def to_control(self) -> int:
        """The bytes of text before the next control token or the end."""
        return (self.ahead[-1][0] if self.ahead else len(self.text)) - self.at

    def read(self, count: int) -> bytes:
        """The next bytes of text; control tokens among them spell nothing."""
        self.at += count
        while self.ahead and self.ahead[-1][0] < self.at:
            self.ahead.pop()
        return self.text[self.at - count : self.at]

    def here(self) -> bytes:
        """The name of the control token that comes before any more text, if one does."""
        return self.ahead[-1][2] if self.ahead and not self.to_control() else b""

    def foresees(self, name: bytes) -> bool:
        """Whether `name` comes next, control tokens before it left out."""
        control = bool(self.ahead) and self.last.get((self.at, name), -1) >= self.ahead[-1][1]
        return control or self.text.startswith(name, self.at)

    def skip(self, spelled: bool) -> None:
        """Go past a control token, which spells its name or nothing."""
        _, n, name = self.ahead.pop()
        self.spelled[n] = name if spelled else b""


def _settle_controls(student: _Response, teacher: _Response) -> None:
    """Let control tokens spell their names where the other response spells the same at that point."""
    while student.ahead or teacher.ahead:
        count = min(student.to_control(), teacher.to_control())
        if student.read(count) != teacher.read(count):
            return
        ours, theirs = student.here(), teacher.here()
        ours_comes, theirs_comes = teacher.foresees(ours), student.foresees(theirs)
        if not ours and not theirs:
            return
        if ours == theirs:
            student.skip(spelled=True)
            teacher.skip(spelled=True)
        elif not theirs:
            student.skip(ours_comes)
            teacher.read(len(ours) * ours_comes)
        elif not ours:
            teacher.skip(theirs_comes)
            student.read(len(theirs) * theirs_comes)
        else:  # the one whose name is still to come waits for it; if both are, they are in another order
            if theirs_comes or not ours_comes:
                student.skip(spelled=False)
            if ours_comes or not theirs_comes:
                teacher.skip(spelled=False)


def _most_pairs(
    student: Spelling, student_ids: list[int], teacher: Spelling, teacher_ids: list[int]
) -> Pairs:
    """The pairs as decoded, unless there are more with a space at the start dropped or kept."""
    usual = student.drops_space[0], teacher.drops_space[0]
    choices = sorted(product(student.drops_space, teacher.drops_space), key=lambda c: (c != usual, sum(c)))
    ours, theirs = partial(_Response, student, student_ids), partial(_Response, teacher, teacher_ids)
    return max((_pairs(ours(drops), theirs(also)) for drops, also in choices), key=len)


def _pairs(student: _Response, teacher: _Response) -> Pairs:
    _settle_controls(student, teacher)
    ours, theirs = b"".join(student.spelled), b"".join(teacher.spelled)
    agreed = min(_common_prefix(ours, theirs), _decode(ours, student.ended)[1])
    our_keys, their_keys = _keys(student.spelled, agreed), _keys(teacher.spelled, agreed)
    _, i, j = np.intersect1d(our_keys, their_keys, assume_unique=True, return_indices=True)
    pairs = list(zip(i.tolist(), j.tolist(), strict=True))
    if student.ended and teacher.ended and agreed == len(ours) == len(theirs):
        pairs.append((len(student.spelled), len(teacher.spelled)))
    return pairs


def _keys(spelled: list[bytes], agreed: int) -> np.ndarray:
    """For tokens that end within the agreed bytes: that end, and the rank among the tokens that share it."""
    ends = np.cumsum([*map(len, spelled)], dtype=np.int64)
    ends = ends[ends <= agreed]
    return (ends << 32) + np.arange(len(ends)) - np.searchsorted(ends, ends)


def _common_prefix(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other))
    differ = np.frombuffer(one[:length], np.uint8) != np.frombuffer(other[:length], np.uint8)
    return int(differ.argmax()) if differ.any() else length


def _decode(data: bytes, ended: bool) -> tuple[str, int]:
    """The text before any invalid UTF-8, and where that starts, at the latest at the end of `data`.

    A character that the end of `data` cuts off is invalid if the response has `ended`.
    """
    try:
        return utf_8_decode(data, "strict", ended)[0], len(data)
    except UnicodeDecodeError as error:
        return data[: error.start].decode(), error.start
