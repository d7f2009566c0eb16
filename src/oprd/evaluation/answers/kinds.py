"""What kind of thing an answer is: a choice, words, a quantity, a collection, a relation, a set or a matrix.

What is none of them, such as a number with a condition, is `Other`, and equal to nothing but the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from oprd.evaluation.answers.tokens import Tokens


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple-choice question, and the text of that choice if it is given."""

    letter: str
    content: "Answer | None"


@dataclass(frozen=True)
class Words:
    """Words alone, in lower case and without spaces; `tokens` if they could be variables side by side."""

    text: str
    tokens: Tokens = ()


@dataclass(frozen=True)
class Quantity:
    """An expression and the words of its unit.

    `without_letters` is what it is if the `letters` at its end are a unit, as the m of "5 m".
    """

    tokens: Tokens
    unit: frozenset[str] = frozenset()
    percent: bool = False
    without_letters: Tokens = ()
    letters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Collection:
    """Answers side by side. `brackets` is "" for a list without any, in which order does not matter."""

    brackets: str
    items: "Sequence[Answer]"
    joined_by_or: bool = False


@dataclass(frozen=True)
class Named:
    """`name = value` or `name in value`."""

    name: Tokens
    value: "Answer"


@dataclass(frozen=True)
class Relation:
    """Expressions with a sign between each and the next."""

    parts: Sequence[Tokens]
    signs: Sequence[str]


@dataclass(frozen=True)
class SetOf:
    """Sets joined by operations; `operation` is "" for a set that a symbol stands for."""

    operation: str
    parts: "Sequence[Answer]"
    symbol: str = ""


@dataclass(frozen=True)
class Matrix:
    """A matrix, by its entries where it is written out, else an expression of matrices."""

    rows: Sequence[Sequence[Tokens]]
    tokens: Tokens


@dataclass(frozen=True)
class Other:
    text: str


Answer = Choice | Words | Quantity | Collection | Named | Relation | SetOf | Matrix | Other
