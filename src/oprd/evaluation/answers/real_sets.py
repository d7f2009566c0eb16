"""Whether two answers are the same set of numbers: intervals, unions, inequalities in one variable, sets."""

from functools import reduce

import sympy

from oprd.evaluation.answers.expressions import Unreadable, read
from oprd.evaluation.answers.kinds import Answer, Collection, Named, Quantity, Relation, SetOf
from oprd.evaluation.answers.tokens import render

RELATIONS = {
    "<": sympy.Lt,
    ">": sympy.Gt,
    r"\le": sympy.Le,
    r"\ge": sympy.Ge,
    "=": sympy.Eq,
    r"\ne": sympy.Ne,
}
SYMBOLS = {
    r"\emptyset": sympy.S.EmptySet,
    r"\mathbb{R}": sympy.S.Reals,
    r"\mathbb{Z}": sympy.S.Integers,
    r"\mathbb{N}": sympy.S.Naturals,
    r"\mathbb{Q}": sympy.S.Rationals,
    r"\mathbb{C}": sympy.S.Complexes,
}
OPERATIONS = {r"\cup": sympy.Union, r"\cap": sympy.Intersection, r"\setminus": sympy.Complement}

MOST_PIECES = 20  # intervals, numbers and conditions that are compared; SymPy's time grows with their square


def same_set(given: Answer, wanted: Answer) -> bool:
    """Whether both are the same set; two pairs in brackets are compared as pairs, not here."""
    if (
        isinstance(given, Collection)
        and isinstance(wanted, Collection)
        and not (_is_solution(given) or _is_solution(wanted))
    ):
        return False
    if isinstance(given, Quantity) or isinstance(wanted, Quantity):
        return False
    if _pieces(given) + _pieces(wanted) > MOST_PIECES:
        return False
    variables = {symbol for answer in (given, wanted) for symbol in _variables(answer)}
    try:
        first, second = _as_set(given), _as_set(wanted)
    except (Unreadable, NotImplementedError):
        return False
    if len(variables) > 1:
        return False
    return bool(first == second or sympy.SymmetricDifference(first, second) == sympy.S.EmptySet)


def _pieces(answer: Answer) -> int:
    match answer:
        case SetOf(parts=parts) | Collection(items=parts):
            return sum(map(_pieces, parts))
        case Named(value=value):
            return _pieces(value)
    return 1


def _is_solution(collection: Collection) -> bool:
    return any(isinstance(item, (Relation, SetOf)) for item in collection.items)


def _variables(answer: Answer) -> set[sympy.Symbol]:
    if isinstance(answer, Relation):
        return {symbol for part in answer.parts for symbol in read(part).free_symbols}
    if isinstance(answer, Named):
        return {sympy.Symbol(render(answer.name), real=True)}
    if isinstance(answer, Collection):
        return {symbol for item in answer.items for symbol in _variables(item)}
    return set()


def _as_set(answer: Answer) -> sympy.Set:
    match answer:
        case SetOf(operation="", symbol=symbol) if symbol in SYMBOLS:
            return SYMBOLS[symbol]
        case SetOf(operation=operation, parts=parts) if operation:
            return reduce(OPERATIONS[operation], map(_as_set, parts))
        case Named(value=value):
            return _as_set(value)
        case Relation(parts=parts, signs=signs):
            values = [read(part) for part in parts]
            if len({symbol for value in values for symbol in value.free_symbols}) != 1:
                raise Unreadable("not one variable")
            relations = (RELATIONS[sign](a, b) for sign, a, b in zip(signs, values, values[1:], strict=False))
            return sympy.Intersection(*(relation.as_set() for relation in relations))
        case Collection(brackets="", items=items, joined_by_or=joined_by_or):
            operation = sympy.Union if joined_by_or or not _is_solution(answer) else sympy.Intersection
            return operation(*map(_as_set, items))
        case Collection(brackets=r"\{\}", items=items):
            return sympy.FiniteSet(*(_number(item) for item in items))
        case Collection(brackets=brackets, items=[low, high]) if brackets in ("()", "(]", "[)", "[]"):
            start, end = _number(low), _number(high)
            if start.is_number and end.is_number and not start < end:
                raise Unreadable("no interval")
            return sympy.Interval(start, end, brackets[0] == "(", brackets[1] == ")")
        case Quantity():
            return sympy.FiniteSet(_number(answer))
    raise Unreadable("not a set")


def _number(answer: Answer) -> sympy.Expr:
    if not isinstance(answer, Quantity):
        raise Unreadable("not a number")
    return read(answer.tokens).doit()
