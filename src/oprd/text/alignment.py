"""Which positions of a student's and a teacher's response have read the same bytes, under two tokenizers."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, product

import numpy as np
from tokenizers.normalizers import Sequence
from transformers import PreTrainedTokenizerBase as Tokenizer

from oprd.text.agreement import NOWHERE, Normalize, agree
from oprd.text.decoding import valid_utf8
from oprd.text.response_text import ResponseText, settle_controls
from oprd.text.spelling import Spelling, encode, end_of_turn, same_vocabulary, spelling

Ids = Iterable[int]
Pairs = list[tuple[int, int]]

NOTHING = -1  # an id that is no token
LOST_ROWS, LOST_SHARE = 10, 0.1  # beyond the text that both read, of a response whose pairing has collapsed
EXCERPT = 40  # bytes of text that are shown


def align_tokens(
    student_tokenizer: Tokenizer,
    student_ids: Ids,
    teacher_tokenizer: Tokenizer,
    teacher_ids: Ids,
    *,
    student_ends: Ids = (),
    teacher_ends: Ids = (),
) -> Pairs:
    """Pairs (i, j), 0-based: `student_ids[:i+1]` and `teacher_ids[:j+1]` spell the same bytes.

    Strictly increasing and as many as possible. Where the bytes differ but a normaliser of either tokenizer
    (NFC, lower case, …) maps both to the same text, pairing continues after it. An end token in last
    place pairs with the other's, if all before it agrees: the tokenizer's EOS, its end of turn, and what
    `student_ends` or `teacher_ends` adds, as a generation config lists them. Other special tokens spell their
    name where the other response spells it, and nothing elsewhere. Nothing pairs beyond the first difference
    that remains, or the student's first invalid UTF-8. Equal ids of one vocabulary pair one to one; else a
    tokenizer without bytes raises `UserError`.
    """
    student_ids, teacher_ids = _as_list(student_ids), _as_list(teacher_ids)
    if student_ids == teacher_ids and same_vocabulary(student_tokenizer, teacher_tokenizer):
        return [(i, i) for i in range(len(student_ids))]
    student = spelling(student_tokenizer, "student").ended_by(_as_list(student_ends))
    teacher = spelling(teacher_tokenizer, "teacher").ended_by(_as_list(teacher_ends))
    return _best_match(student, student_ids, teacher, teacher_ids).pairs


def row_pairs(pairs: Pairs, num_student: int, num_teacher: int) -> Pairs:
    """Token pairs as rows: (i, j) gives (i+1, j+1), the rows that have read them, and (0, 0) always pairs."""
    rows = [(0, 0), *((i + 1, j + 1) for i, j in pairs)]
    return [(i, j) for i, j in rows if i < num_student and j < num_teacher]


@dataclass(frozen=True)
class Stop:
    """Where pairing ended before the student's text did: how many rows come after it, and what stands there.

    `before` is text that both have read, `student` and `teacher` how their texts go on.
    """

    rows: int
    before: str
    student: str
    teacher: str
    invalid_utf8: bool


@dataclass(frozen=True)
class AlignedResponse:
    """A student's response in the teacher's tokens, which end where the student's bytes are invalid UTF-8."""

    teacher_ids: list[int]
    rows: Pairs  # (student, teacher) rows that have read the same
    num_rows: int  # the student's
    invalid_utf8: bool
    ends_together: bool = False  # all has been read, and the end tokens pair
    stop: Stop | None = field(default=None, compare=False)  # None if the texts agree to the end

    @property
    def coverage(self) -> float:
        """The share of the student's rows that are paired; 0 without rows."""
        return len(self.rows) / self.num_rows if self.num_rows else 0.0

    @property
    def collapsed(self) -> bool:
        """Whether pairing stopped well before the end: a tenth of the rows, and ten of them, come after."""
        return self.stop is not None and self.stop.rows >= max(LOST_ROWS, LOST_SHARE * self.num_rows)

    def within(self, room: int) -> "AlignedResponse":
        """What a teacher reads that has positions for `room` tokens, and the rows that have read the same."""
        if len(self.teacher_ids) <= room:
            return self
        rows = [(i, j) for i, j in self.rows if j < room]
        return replace(self, teacher_ids=self.teacher_ids[:room], rows=rows, ends_together=False)


class Aligner:
    """Hands a student's responses to a teacher; `UserError` if one must, but cannot, be read as bytes.

    `student_ends`: what ends a response beside the EOS and the end of turn of the student's tokenizer.
    """

    def __init__(
        self, student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer, student_ends: Ids = ()
    ) -> None:
        self.student_tokenizer, self.teacher_tokenizer = student_tokenizer, teacher_tokenizer
        self.student_ends = _as_list(student_ends)
        self.same_vocabulary = same_vocabulary(student_tokenizer, teacher_tokenizer)
        if not self.same_vocabulary:
            for tokenizer, role in (student_tokenizer, "student"), (teacher_tokenizer, "teacher"):
                spelling(tokenizer, role)

    def align(self, student_ids: Ids) -> AlignedResponse:
        """The student's own ids under one vocabulary, else the teacher's tokenization of the same text.

        That text has no special tokens and stops at invalid UTF-8; the teacher ends, with its own end of
        turn, where the student did.
        """
        ids = _as_list(student_ids)
        if self.same_vocabulary:
            rows = [(t, t) for t in range(len(ids))]
            return AlignedResponse(ids, rows, len(ids), invalid_utf8=False, ends_together=True)
        student = spelling(self.student_tokenizer, "student").ended_by(self.student_ends)
        plain = [NOTHING if i in student.controls else i for i in ids]
        if ids and ids[-1] in student.ends:
            plain[-1] = ids[-1]
        response = ResponseText(student, plain, student.drops_space[0])
        text, valid = valid_utf8(response.text, response.ended)
        teacher_ids = encode(self.teacher_tokenizer, text) if text else []
        end = end_of_turn(self.teacher_tokenizer)
        if response.ended and valid == len(response.text) and end is not None:
            teacher_ids.append(end)
        match = _best_match(student, plain, spelling(self.teacher_tokenizer, "teacher"), teacher_ids)
        rows = row_pairs(match.pairs, len(ids), len(teacher_ids))
        ends = response.ended and match.pairs[-1:] == [(len(ids) - 1, len(teacher_ids) - 1)]
        return AlignedResponse(teacher_ids, rows, len(ids), valid < len(response.text), ends, match.stop)


def _as_list(ids: Ids) -> list[int]:
    return [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]


@dataclass(frozen=True)
class _Match:
    """Pairs of tokens, and where the texts stop agreeing before the student's ends."""

    pairs: Pairs
    stop: Stop | None


def _best_match(
    student: Spelling, student_ids: list[int], teacher: Spelling, teacher_ids: list[int]
) -> _Match:
    """The pairs as decoded, unless there are more with a space at the start dropped or kept."""
    usual = student.drops_space[0], teacher.drops_space[0]
    choices = sorted(product(student.drops_space, teacher.drops_space), key=lambda c: (c != usual, sum(c)))
    ours, theirs = partial(ResponseText, student, student_ids), partial(ResponseText, teacher, teacher_ids)
    both = [one for one in (student.normalizer, teacher.normalizer) if one is not None]
    normalize = Sequence(both).normalize_str if both else None
    matches = (_match(ours(drops), theirs(also), normalize) for drops, also in choices)
    return max(matches, key=lambda match: len(match.pairs))


def _match(student: ResponseText, teacher: ResponseText, normalize: Normalize | None) -> _Match:
    settle_controls(student, teacher)
    ours, theirs = b"".join(student.spelled), b"".join(teacher.spelled)
    valid = valid_utf8(ours, student.ended)[1]
    read, also = agree(ours[:valid], theirs, normalize)
    our_keys, our_tokens = _keys(student.spelled, read.marks)
    their_keys, their_tokens = _keys(teacher.spelled, also.marks)
    _, i, j = np.intersect1d(our_keys, their_keys, assume_unique=True, return_indices=True)
    pairs = list(zip(our_tokens[i].tolist(), their_tokens[j].tolist(), strict=True))
    if student.ended and teacher.ended and (read.at, also.at) == (len(ours), len(theirs)):
        pairs.append((len(student.spelled), len(teacher.spelled)))
    rest = ours[read.at :], theirs[also.at :]
    return _Match(pairs, _stop(student.spelled, ours[: read.at], *rest, invalid_utf8=read.at == valid))


def _keys(spelled: list[bytes], marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of tokens that end at a mark: that mark with the rank among those that share it, and their numbers.

    Of a mark's positions the last counts at which a token ends: a token has read what its end drops.
    """
    ends = np.cumsum([*map(len, spelled)], dtype=np.int64)
    tokens = np.flatnonzero(ends < len(marks))
    tokens = tokens[marks[ends[tokens]] != NOWHERE]
    found = marks[ends[tokens]]
    last = np.searchsorted(found, found, side="right") - 1
    tokens = tokens[ends[tokens] == ends[tokens[last]]]
    found = marks[ends[tokens]]
    return (found << 32) + np.arange(len(found)) - np.searchsorted(found, found), tokens


def _stop(spelled: list[bytes], read: bytes, ours: bytes, theirs: bytes, invalid_utf8: bool) -> Stop | None:
    """Where pairing ended, after `read`, if the student's text goes on."""
    if not ours:
        return None
    rows = sum(end > len(read) for end in accumulate(map(len, spelled)))
    before = read[-EXCERPT:].decode(errors="ignore")
    student, teacher = (text[:EXCERPT].decode(errors="replace") for text in (ours, theirs))
    return Stop(rows, before, student, teacher, invalid_utf8)
