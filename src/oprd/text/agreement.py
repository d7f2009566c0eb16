"""How far two texts agree, when tokenizers have normalised one of them or both."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from oprd.text.decoding import valid_utf8

Normalize = Callable[[str], str]

NOWHERE = -1
CONTEXT = 32  # bytes before a difference that a normaliser is shown, of text that is the same in both
LONGEST_CONTEXT = 256  # and of text that is not
LONGEST = 32  # characters of either text within which both have to normalise to the same again
BLOCK = 64  # bytes


@dataclass
class ReadText:
    """A text, read up to `at`, and a mark for every position up to there.

    Positions of two texts share a mark where the same has been read, normalised; −1 is a position without
    such a one in the other text. Marks never fall, and stay as they are over what a normaliser drops. It is
    shown the text from `context` on.
    """

    text: bytes
    at: int = 0
    context: int = 0
    marks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.marks = np.full(len(self.text) + 1, NOWHERE)
        self.marks[0] = 0

    def part(self, start: int, stop: int) -> str:
        """The whole characters of a part before any invalid UTF-8."""
        while start < stop and _continues(self.text, start):
            start += 1
        return valid_utf8(self.text[start:stop], ended=False)[0]


def agree(ours: bytes, theirs: bytes, normalize: Normalize | None) -> tuple[ReadText, ReadText]:
    """Read both texts as far as they agree: byte by byte, and past parts that `normalize` makes the same."""
    one, other = ReadText(ours), ReadText(theirs)
    count = _read_equal(one, other)
    while normalize is not None and _read_normalized(one, other, count, normalize):
        count = _read_equal(one, other)
    return one, other


def _read_equal(one: ReadText, other: ReadText) -> int:
    """Go on to the next byte that differs; returns how many were equal."""
    count = _common_prefix(one.text, one.at, other.text, other.at)
    marks = one.marks[one.at] + np.arange(count + 1)
    for side in (one, other):
        side.marks[side.at : side.at + count + 1] = marks
        side.at += count
    return count


def _common_prefix(one: bytes, i: int, other: bytes, j: int) -> int:
    """How many bytes are equal from `i` and `j` on."""
    limit, done, size = min(len(one) - i, len(other) - j), 0, BLOCK
    while done < limit:
        size = min(size, limit - done)
        ours, theirs = one[i + done : i + done + size], other[j + done : j + done + size]
        if ours == theirs:
            done, size = done + size, 2 * size
        elif size <= BLOCK:
            return done + next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        else:
            size = BLOCK
    return limit


def _read_normalized(one: ReadText, other: ReadText, equal: int, normalize: Normalize) -> bool:
    """Go past the shortest parts that normalise to the same; False, and no step, if there are none.

    The last `equal` bytes are the same in both; those of a character that then differs are taken back.
    """
    back = 0
    while back < equal and (_continues(one.text, one.at - back) or _continues(other.text, other.at - back)):
        back += 1
    sides = (one, one.at - back), (other, other.at - back)
    _choose_context(sides, equal - back)
    lengths = _next_agreement(
        normalize,
        [side.part(side.context, start) for side, start in sides],
        [side.part(start, start + 4 * LONGEST) for side, start in sides],
    )
    if lengths is None:
        return False
    if back and lengths == (back, back):  # what goes on there are stray bytes, of no character that differs
        return _read_normalized(one, other, 0, normalize)
    mark = one.marks[one.at - back] + all(lengths)
    for (side, start), length in zip(sides, lengths, strict=True):
        side.marks[start + 1 : side.at + 1] = NOWHERE
        side.at = start + length
        side.marks[side.at] = mark
    return True


def _choose_context(sides: tuple[tuple[ReadText, int], ...], equal: int) -> None:
    """Show a normaliser some of the `equal` bytes before a difference, or all since the last time."""
    shown = max(start - side.context for side, start in sides)
    for side, start in sides:
        if equal >= CONTEXT or (equal and shown > CONTEXT):
            side.context = start - min(equal, CONTEXT)
        elif shown > LONGEST_CONTEXT:
            side.context = start


def _continues(data: bytes, at: int) -> bool:
    """Whether a character goes on at `at`."""
    return at < len(data) and 0x80 <= data[at] < 0xC0


def _next_agreement(normalize: Normalize, befores: list[str], parts: list[str]) -> tuple[int, int] | None:
    """The bytes of the shortest starts of `parts` that normalise to the same, given the text before them."""
    seen = [{normalize(before): 0} for before in befores]
    for length in range(1, LONGEST + 1):
        for side, (before, part) in enumerate(zip(befores, parts, strict=True)):
            if length > len(part):
                continue
            normalized = normalize(before + part[:length])
            if normalized in seen[1 - side]:
                found = [0, 0]
                found[side], found[1 - side] = length, seen[1 - side][normalized]
                return len(parts[0][: found[0]].encode()), len(parts[1][: found[1]].encode())
            seen[side].setdefault(normalized, length)
    return None
