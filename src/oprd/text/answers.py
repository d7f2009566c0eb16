"""Reference answers: which column of a dataset holds them, and numbers as text that a grader reads."""

import logging
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from numbers import Number
from typing import Any

import numpy as np

from oprd.foundation.errors import UserError

logger = logging.getLogger(__name__)

VERL = "reward_model"  # verl's column: an object that holds the answer as `ground_truth`
ANSWER_COLUMNS = ("solution", VERL, "answer", "final_answer", "expected_answer", "ground_truth")

MARK = "####"  # before the answer, in the last line of GSM8K's
WORD = re.compile(r"(?<![\\a-zA-Z])[^\W\d_]{2,}")  # LaTeX commands are none
SHORT_WORDS, SHORT_CHARACTERS = 4, 100  # an answer by itself has no more
LONGEST_NUMBER = 400  # digits; every double has fewer before the point and in front of its first one


class JSONFloat(float):
    """A number of a JSON file that `str` shows as it is written there."""

    def __new__(cls, literal: str) -> "JSONFloat":
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    literal: str

    def __str__(self) -> str:
        return self.literal


def answer_text(value: Any, at: str) -> str | None:
    """A reference answer as text, or None where it is missing (None, NaN).

    Numbers are written out without an exponent, whole ones without a point: 5e-05 is "0.00005" and 12.0
    is "12". Of a text that ends with a line `#### 42`, as GSM8K's, only 42 stays. Raises `UserError`,
    naming the row `at`, for anything but text and numbers.
    """
    if isinstance(value, np.generic) and not isinstance(value, np.floating):
        value = value.item()
    if isinstance(value, str):
        return after_mark(value) or value
    if value is None or (isinstance(value, Number) and value != value):  # NaN is pandas' missing value
        return None
    if isinstance(value, Number):
        return _number_text(value)
    raise UserError(f"{at}: the solution is {shown(value)}, neither text nor a number: write it as text.")


def after_mark(text: str) -> str | None:
    """What stands after `####` in the last line of `text`, as in GSM8K's solutions."""
    line = text.rstrip().rpartition("\n")[2]
    answer = line.removeprefix(MARK).strip()
    return answer if line.startswith(MARK) and answer and answer[0] != "#" else None


def reference_answers(rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[str | None]:
    """The reference answer of every row, all from one column where one has them all.

    It is the column of `ANSWER_COLUMNS` in which most rows hold an answer: short, boxed, or after
    `####`. Between equals, the one with more short answers, then the first. A row without it takes the
    first other column that has something. A choice, and answers that are prose, are logged. Raises
    `UserError` where all there is in a row is neither text nor a number.
    """
    columns: dict[str, list[str | None]] = {}
    refused = []
    for column in ANSWER_COLUMNS:
        try:
            answers = [answer_text(_cell(row, column), at) for row, at in zip(rows, places, strict=True)]
        except UserError as error:
            refused.append(error)
        else:
            columns |= {column: answers} if any(answer is not None for answer in answers) else {}
    if not columns:
        if refused:
            raise refused[0]
        return [None] * len(rows)
    ranked = sorted(columns, key=lambda name: _holding(columns[name]), reverse=True)
    chosen = [next((name for name in ranked if columns[name][i]), ranked[0]) for i in range(len(rows))]
    _tell(ranked, columns, sum(name != ranked[0] for name in chosen))
    return [columns[name][i] for i, name in enumerate(chosen)]


def shown(value: Any) -> str:
    """`value` for a message: `missing`, or its type and how it begins."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _cell(row: Mapping[str, Any], column: str) -> Any:
    value = row.get(column)
    if column == VERL:
        return value.get("ground_truth") if isinstance(value, Mapping) else None
    return value


def _number_text(number: Any) -> str:
    try:
        exact = Decimal(str(number))
    except InvalidOperation:  # True, 1/3
        return str(number)
    if exact.is_infinite():
        return r"\infty" if exact > 0 else r"-\infty"
    if abs(exact.adjusted()) > LONGEST_NUMBER:
        return str(number)
    return str(int(exact)) if exact == exact.to_integral_value() else format(exact, "f")


def _is_short(answer: str) -> bool:
    return len(answer) <= SHORT_CHARACTERS and len(WORD.findall(answer)) <= SHORT_WORDS


def _holding(answers: Sequence[str | None]) -> tuple[int, int]:
    """How many rows hold an answer, and how many hold a short one."""
    present = [answer for answer in answers if answer]
    short = [_is_short(answer) for answer in present]
    boxed = [r"\boxed" in answer for answer in present]
    return sum(map(max, short, boxed)), sum(short)


def _tell(ranked: Sequence[str], columns: Mapping[str, Sequence[str | None]], elsewhere: int) -> None:
    total = len(columns[ranked[0]])
    held = {name: _holding(columns[name])[0] for name in ranked}
    if len(ranked) == 1 and held[ranked[0]] == total:
        return
    shares = ", ".join(f"{name} in {held[name]}" for name in ranked)
    others = f"; {elsewhere} rows without it take another column" if elsewhere else ""
    logger.info(
        "reference answers are those of column %s (of %d rows an answer that is short, boxed or after #### "
        "stands in: %s)%s",
        *(ranked[0], total, shares, others),
    )
