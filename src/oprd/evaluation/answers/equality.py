"""Whether two answers are the same; docs/evaluation.md states the rules."""

from collections.abc import Callable, Sequence

from oprd.evaluation.answers.expressions import (
    Unreadable,
    constant_ratio,
    read,
    same_equation,
    same_matrix,
    same_value,
)
from oprd.evaluation.answers.kinds import (
    Answer,
    Choice,
    Collection,
    Matrix,
    Named,
    Other,
    Quantity,
    Relation,
    Words,
)
from oprd.evaluation.answers.real_sets import same_set
from oprd.evaluation.answers.structure import understand
from oprd.evaluation.answers.tokens import Token, Tokens, render

FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
ORDERED = {"()"}
BINDING = {r"\sum", r"\prod", r"\int", r"\lim"}  # the letter below them is no unknown


def same(given: Answer, wanted: Answer) -> bool:
    """Whether `given` is the answer `wanted`, the reference."""
    if isinstance(given, Other) or isinstance(wanted, Other):
        return given == wanted
    if isinstance(given, Choice) or isinstance(wanted, Choice):
        return _same_choice(given, wanted)
    if isinstance(given, Named) and isinstance(wanted, Named) and render(given.name) == render(wanted.name):
        return same(given.value, wanted.value)
    match given, wanted:
        case Words(), Words():
            return given.text == wanted.text
        case Quantity(), Quantity():
            return _same_quantity(given, wanted)
        case Matrix(), Matrix():
            return _same_matrix(given, wanted)
        case Collection(), Collection() if _same_collection(given, wanted):
            return True
        case Relation(), Quantity():
            return _same_quantity_of(given, wanted)
        case Collection(joined_by_or=True, items=spellings), Quantity():  # 1/2 or 0.5
            return all(same(spelling, wanted) for spelling in spellings)
    return (
        _same_unwrapped(given, wanted, same)
        or _same_unwrapped(wanted, given, lambda a, b: same(b, a))
        or _same_relation(_as_relation(given), _as_relation(wanted))
        or same_set(given, wanted)
    )


def _same_choice(given: Answer, wanted: Answer) -> bool:
    first, second = _letter(given), _letter(wanted)
    if first and second:
        return first == second
    if isinstance(given, Choice):
        return given.content is not None and same(given.content, wanted)
    return isinstance(wanted, Choice) and wanted.content is not None and same(given, wanted.content)


def _letter(answer: Answer) -> str | None:
    if isinstance(answer, Choice):
        return answer.letter
    if isinstance(answer, Quantity) and len(answer.tokens) == 1 and answer.tokens[0].kind == "letter":
        return answer.tokens[0].text.upper()
    return None


def _same_quantity(given: Quantity, wanted: Quantity) -> bool:
    """Equal values and no two units; a percentage is equal to its number and to its value."""
    if not _compatible(_dimension(given), _dimension(wanted)):
        return False
    if _same_tokens(given.tokens, wanted.tokens):
        return True
    if given.percent != wanted.percent:
        first, second = (_hundredth(q.tokens) if q.percent else q.tokens for q in (given, wanted))
        return _same_tokens(first, second)
    for quantity, other in ((given, wanted), (wanted, given)):
        if quantity.without_letters and not any(token.kind == "letter" for token in other.tokens):
            return _compatible(quantity.letters, other.unit) and _same_tokens(
                quantity.without_letters, other.tokens
            )
    return False


def _dimension(quantity: Quantity) -> frozenset[str]:
    return quantity.unit | {"%"} if quantity.percent else quantity.unit


def _compatible(unit: frozenset[str], other: frozenset[str]) -> bool:
    return unit <= other or other <= unit


def _same_tokens(given: Tokens, wanted: Tokens) -> bool:
    if render(given) == render(wanted):
        return True
    if (
        len(given) == len(wanted) == 1
        and wanted[0].text in "ABCDE"
        and given[0].text == wanted[0].text.lower()
    ):
        return True
    if _has_base(given) or _has_base(wanted):
        return _digits_in_base(given) == _digits_in_base(wanted)
    return same_value(given, wanted)


def _has_base(tokens: Tokens) -> bool:
    """Whether digits have a subscript: a numeral in another base than ten."""
    texts = [token.text for token in tokens]
    if "_" not in texts:
        return False
    digits = [t for t in tokens[: texts.index("_")] if t.text not in ("-", "(", ")")]
    return (len(digits) > 1 or any(t.kind == "number" for t in digits)) and all(
        t.kind == "number" or (t.kind == "letter" and t.text.isupper()) for t in digits
    )


def _digits_in_base(tokens: Tokens) -> str:
    return (
        "".join(token.text for token in tokens if token.text not in "() ")
        .lstrip("0")
        .replace("-0", "-")
        .upper()
    )


def _hundredth(tokens: Tokens) -> Tokens:
    return [Token("mark", "("), *tokens, Token("mark", ")"), Token("mark", "/"), Token("number", "100")]


def _same_matrix(given: Matrix, wanted: Matrix) -> bool:
    if not given.rows or not wanted.rows:
        return same_matrix(given.tokens, wanted.tokens)
    return [len(row) for row in given.rows] == [len(row) for row in wanted.rows] and all(
        same(understand(a), understand(b))
        for row, other in zip(given.rows, wanted.rows, strict=True)
        for a, b in zip(row, other, strict=True)
    )


def _same_collection(given: Collection, wanted: Collection) -> bool:
    kinds = {given.brackets, wanted.brackets}
    if kinds == {":"}:
        return len(given.items) == len(wanted.items) and all(
            same_value(_product(a, wanted.items[0]), _product(b, given.items[0]))
            for a, b in zip(given.items, wanted.items, strict=True)
        )
    if kinds == {r"\{\}"}:
        return all(any(same(a, b) for b in wanted.items) for a in given.items) and all(
            any(same(a, b) for a in given.items) for b in wanted.items
        )
    if kinds <= {"", r"\{\}"}:
        return _same_in_some_order(given.items, wanted.items)
    if len(kinds) == 1 or kinds <= {"", *ORDERED}:
        return any(_same_in_order(items, others) for items in _orders(given) for others in _orders(wanted))
    return False


def _product(*factors: Answer) -> Tokens:
    return [
        t
        for f in factors
        if isinstance(f, Quantity)
        for t in (Token("mark", "("), *f.tokens, Token("mark", ")"))
    ]


def _same_in_order(given: Sequence[Answer], wanted: Sequence[Answer]) -> bool:
    return len(given) == len(wanted) and all(map(same, given, wanted))


def _same_in_some_order(given: Sequence[Answer], wanted: Sequence[Answer]) -> bool:
    left = list(wanted)
    for item in given:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        left.pop(found)
    return not left


def _orders(collection: Collection) -> list[Sequence[Answer]]:
    """The items as they are written and, of x = 1, y = 2, in the order of the names."""
    named = [item for item in collection.items if isinstance(item, Named)]
    if len(named) < len(collection.items):
        return [collection.items]
    return [[n.value for n in named], [n.value for n in sorted(named, key=lambda n: render(n.name))]]


def _same_unwrapped(wrapped: Answer, other: Answer, compare: Callable[[Answer, Answer], bool]) -> bool:
    """Whether what `wrapped` holds is the same as `other`, which is not wrapped itself."""
    match wrapped, other:
        case Named(), Named() | Relation():
            return False
        case Named(value=value), _:
            return compare(value, other)
        case Collection(brackets=r"\{\}", items=[only]), Quantity() | Words():
            return compare(only, other)
        case Matrix(rows=rows), Collection(brackets="()", items=items) if (rows and len(rows) == 1) or {
            len(row) for row in rows
        } == {1}:
            entries = [understand(entry) for row in rows for entry in row]
            return len(entries) == len(items) and all(map(compare, entries, items))
        case Collection(brackets=":", items=[first, second]), Quantity():
            return compare(Quantity([*_product(first), Token("mark", "/"), *_product(second)]), other)
        case Words(tokens=tokens), Quantity() if tokens:
            return compare(Quantity(tokens), other)
    return False


def _same_quantity_of(given: Relation, wanted: Quantity) -> bool:
    """m + n = 25 and 3 + 4 = 7 state a number; 2x = 10, one equation for one variable, does not."""
    if set(given.signs) != {"="}:
        return False
    before = [token for part in given.parts[:-1] for token in part]
    letters = {token.text for token in before if token.kind == "letter"}
    solved = len(letters) == 1 and not any(token.text in BINDING for token in before)
    return not solved and same(understand(given.parts[-1]), wanted)


def _as_relation(answer: Answer) -> Relation | None:
    if isinstance(answer, Named) and isinstance(answer.value, Quantity):
        return Relation([answer.name, answer.value.tokens], ["="])
    return answer if isinstance(answer, Relation) else None


def _same_relation(given: Relation | None, wanted: Relation | None) -> bool:
    """The same signs between equal parts, in either direction, or one sign and proportional sides."""
    if given is None or wanted is None:
        return False
    flipped = [FLIPPED[sign] for sign in reversed(given.signs)]
    for parts, signs in ((given.parts, list(given.signs)), (given.parts[::-1], flipped)):
        if signs == list(wanted.signs) and all(map(_same_tokens, parts, wanted.parts)):
            return True
    if not len(given.signs) == len(wanted.signs) == 1:
        return False
    try:
        differences = [read(relation.parts[0]) - read(relation.parts[1]) for relation in (given, wanted)]
    except Unreadable:
        return False
    if given.signs == wanted.signs == ["="]:
        return same_equation(*differences)
    ratio = constant_ratio(*differences)
    sign = given.signs[0] if ratio is not None and ratio > 0 else FLIPPED[given.signs[0]]
    return ratio is not None and sign == wanted.signs[0]
