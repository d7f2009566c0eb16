r"""Where a response states its answer: in its last \boxed{}, after "Answer:", "answer is" or `####`.

Every search here is linear in the length of the response, which may be anything that a model wrote.
"""

import re
from typing import NamedTuple

from oprd.text.answers import after_mark

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BARE_BOX = re.compile(r"\\boxed\s*(-?\d[\d.,]*(?<=\d))")
BRACES = re.compile("(?P<box>" + BOX.pattern + r")|\\.|(?P<open>\{)|(?P<close>\})", re.S)
LABEL = re.compile(
    r"[ \t>*_#`-]*(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:(?:final|correct)\s+)?answer(?:\s+is)?"
    r"(?P<colon>[\s*_`]*[:：])?[*_`]*\s*(?P<rest>.*)",
    re.I,
)
STATED = re.compile(r"\b(?:answer|(?:final|correct) (?:option|choice)) is:?\s+", re.I)
GLUE = r"(?:[\s$*~{}]|\\[()\[\],;:! ]|\\q?quad|\\text)*"
JOINED = re.compile(rf"{GLUE}(?:[,;]|,?{GLUE}(?:and|or)){GLUE}")
SENTENCE_END = re.compile(r"(?<=[\d)}\]$*%])\.\s+(?=[A-Z])")
CLOSED_OUTSIDE = re.compile(r"[*_]+([.\s]*)$")  # the end of emphasis that began before the label
NOT_BLANK = re.compile(r"\S")
DISPLAY = {"$$": "$$", r"\[": r"\]"}
LONGEST_JOINT = 40  # characters between two boxes that state one answer together
LONGEST_DISPLAY = 20  # lines of a formula below an "Answer:" line


class _Box(NamedTuple):
    """Where a box, its content and the text after it begin."""

    start: int
    inside: int
    end: int


def extract_answer(response: str) -> str | None:
    r"""The answer that `response` states, or None.

    It is the content of the last complete, non-empty `\boxed{}`; boxes joined by nothing but a comma, "and"
    or "or" are one list. Without a box it is the first sentence after the last "Answer:" (Markdown around it
    allowed), on that line or on the next one that is not blank. Without that it is the rest of the sentence
    after the last "answer is" or "correct option is", else what the last line has after `####`. Numbers
    elsewhere in the text never count.
    """
    return _boxed(response) or _labelled(response) or _stated(response) or after_mark(response)


def unboxed(reference: str) -> str:
    r"""`reference` without the `\boxed{}` that some data sets leave around it."""
    return _boxed(reference) or reference


def _boxed(text: str) -> str | None:
    text = BARE_BOX.sub(r"\\boxed{\1}", text)
    boxes = sorted(_boxes(text))  # by where they open
    if not boxes:
        return None
    joined = [boxes.pop()]
    for box in reversed(boxes):
        between = box.end, joined[-1].start
        if not 0 <= between[1] - between[0] <= LONGEST_JOINT or not JOINED.fullmatch(text, *between):
            break
        joined.append(box)
    return ", ".join(dict.fromkeys(text[box.inside : box.end - 1].strip() for box in reversed(joined)))


def _boxes(text: str) -> list[_Box]:
    r"""Every complete, non-empty box; `\{` and `\}` are no braces."""
    open_braces: list[re.Match[str]] = []
    boxes: list[_Box] = []
    if not (first_box := BOX.search(text)):
        return boxes
    for token in BRACES.finditer(text, first_box.start()):
        if token["box"] or token["open"]:
            open_braces.append(token)
        elif token["close"] and open_braces:
            opening = open_braces.pop()
            if (
                opening["box"]
                and (first := NOT_BLANK.search(text, opening.end()))
                and first.end() < token.end()
            ):
                boxes.append(_Box(opening.start(), opening.end(), token.end()))
    return boxes


def _labelled(response: str) -> str | None:
    lines = [line.strip() for line in response.split("\n")]
    below = len(lines)  # the next line that is not blank
    for i in reversed(range(len(lines))):
        if "answer" in lines[i].lower() and (label := LABEL.fullmatch(lines[i])):
            rest = label["rest"].strip()
            if not rest and below < len(lines):
                rest = lines[below]
                found = _displayed(lines, below) if rest in DISPLAY else rest
            elif label["colon"] and rest:
                found = _displayed(lines, i + 1, rest) if rest in DISPLAY else rest
            else:
                found = ""
            if (found := _first_sentence(found)).strip(" *_"):
                return found
        below = i if lines[i] else below
    return None


def _stated(response: str) -> str | None:
    statements = list(STATED.finditer(response))
    return _first_sentence(response[statements[-1].end() :].partition("\n")[0]) if statements else None


def _first_sentence(found: str) -> str:
    found = SENTENCE_END.split(found, maxsplit=1)[0]
    return found if found.startswith(("*", "_")) else CLOSED_OUTSIDE.sub(r"\1", found)


def _displayed(lines: list[str], start: int, opening: str | None = None) -> str:
    """The formula between the delimiter `opening`, by default the line `start`, and the closing one."""
    if opening is None:
        opening, start = lines[start], start + 1
    taken: list[str] = []
    for line in filter(None, lines[start : start + LONGEST_DISPLAY]):
        if line.startswith(DISPLAY[opening]):
            break
        taken.append(line)
    return " ".join(taken)
