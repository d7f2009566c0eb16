r"""Whether two expressions have the same value.

math-verify's LaTeX parser reads them. Their values are compared here, to 20 significant digits at several
points (polynomial identity testing), since `math_verify.verify` (0.9) rounds to 6 decimals and takes what is
below 1e-18 for zero. What could be too large is never evaluated, so that a comparison ends outside the main
thread, too, where math-verify's time limit does not work.
"""

from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy

from oprd.evaluation.answers.brackets import closing
from oprd.evaluation.answers.numerals import exact
from oprd.evaluation.answers.tokens import Token, Tokens
from oprd.foundation.foreign.sympy import known_bits

DIGITS = 30
AGREEING = sympy.Float(10) ** -20
LARGEST = 5000  # decimal digits of a number that is evaluated
LARGEST_EXPONENT = 10**5
LONGEST_SUM = 100
MOST_TOKENS = 300
UNREAD = {"'", '"', r"\dots"}  # the parser leaves them out
ROUNDED_PLACES = 6  # decimals from which on a decimal may stand for the number that it rounds
POINTS = [(7, 5), (-11, 7), (3, 1), (23, 9), (-5, 3), (2, 1)]
PRIMES = (1, 3, 7, 2, 11, 5, 13, 17)


class Unreadable(ValueError):
    """An expression that has no value here: it does not parse, or is too large."""


def same_value(left: Tokens, right: Tokens) -> bool:
    """Whether both have the same value wherever both are real; False for what cannot be read or evaluated."""
    try:
        first, second = read(left), read(right)
        return _agree(first, second) or _rounded(left, second) or _rounded(right, first)
    except Unreadable:
        return False


def same_equation(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether `left` = 0 says what `right` = 0 says: one is a multiple of the other, up to denominators."""
    numerators = [sympy.fraction(sympy.together(side))[0] for side in (left, right)]
    return constant_ratio(left, right) is not None or constant_ratio(*numerators) is not None


def same_matrix(left: Tokens, right: Tokens) -> bool:
    """Whether two expressions of matrices have the same value."""
    try:
        first, second = (sympy.Matrix(_parse(_spelled(tokens)).doit()) for tokens in (left, right))
    except (Unreadable, TypeError, ValueError):
        return False
    return first.shape == second.shape and all(map(_agree, first, second))


def constant_ratio(left: sympy.Expr, right: sympy.Expr) -> Any:
    """The number other than 0 that `left` is `right` times at every point; None if there is none."""
    ratios = []
    for point in _points(left, right):
        above, below = _value(left, point), _value(right, point)
        if above is not None and below is not None and below != 0:
            ratios.append(above / below)
    constant = len(ratios) > 2 and ratios[0] != 0 and all(_close(ratio, ratios[0]) for ratio in ratios)
    return ratios[0] if constant and ratios[0].is_real else None


def read(tokens: Tokens) -> sympy.Expr:
    """The SymPy expression of `tokens`; raises `Unreadable`."""
    expression = _parse(_spelled(tokens))
    if not isinstance(expression, sympy.Expr):
        raise Unreadable("no number")
    _size(expression)
    return expression


def _spelled(tokens: Tokens) -> str:
    """`tokens` as the LaTeX that the parser reads rightly."""
    if len(tokens) > MOST_TOKENS:
        raise Unreadable("too long")
    _check_binomials(tokens)
    latex: list[str] = []
    before, ends = Token("mark", ""), _fraction_ends(tokens)
    for i, token in enumerate(tokens):
        if token.kind == before.kind == "number":
            raise Unreadable("two numbers side by side")
        ended = before.kind == "number" or before.text == ")" or i - 1 in ends
        if ended and (token.kind == "number" or token.text in ("(", r"\frac")):
            latex.append(r"\cdot")  # 2(3): the parser takes two numbers side by side for a mixed number
        latex.append(_latex(token.kind, token.text))
        before = token
    return " ".join(latex)


def _check_binomials(tokens: Tokens) -> None:
    """Raise `Unreadable` for binomials of large numbers: the parser evaluates them."""
    for i, token in enumerate(tokens):
        if token.text == r"\binom":
            arguments = tokens[i + 1 : closing(tokens, min(closing(tokens, i + 1) + 1, len(tokens) - 1))]
            if any(len(t.text) > 4 if t.kind == "number" else t.text in ("^", "!") for t in arguments):
                raise Unreadable("too large to evaluate")


def _fraction_ends(tokens: Tokens) -> set[int]:
    fractions = [i for i, token in enumerate(tokens) if token.text == r"\frac"]
    return {
        closing(tokens, min(closing(tokens, i + 1) + 1, len(tokens) - 1))
        for i in fractions
        if i + 1 < len(tokens)
    }


def _latex(kind: str, text: str) -> str:
    if kind == "word" or text in UNREAD:
        raise Unreadable(text)
    if kind != "number" or text.isdecimal():
        return text
    try:
        value = exact(text)
    except ValueError as error:
        raise Unreadable(text) from error
    return rf"( \frac {{ {value.numerator} }} {{ {value.denominator} }} )"


@lru_cache(maxsize=256)
def _parse(latex: str) -> Any:
    try:
        expression = latex2sympy(
            latex,
            is_real=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except Exception as error:  # whatever a model wrote
        raise Unreadable(latex) from error
    if expression.has(sympy.Integral, sympy.Derivative, sympy.Limit):
        raise Unreadable("not evaluated")
    names = {symbol.name for symbol in expression.free_symbols}
    if "i" in names and "j" not in names:
        expression = expression.xreplace({sympy.Symbol("i", real=True): sympy.I})
    return expression


def _size(expression: Any) -> float:
    """A bound on the decimal digits of a number not yet evaluated; raises `Unreadable` beyond LARGEST."""
    if isinstance(expression, sympy.Rational):
        size = (
            max(len(str(expression.p)), len(str(expression.q)))
            if abs(expression.p) < 10**4000
            else LARGEST + 1.0
        )
    elif isinstance(expression, (sympy.Sum, sympy.Product)):
        size = _size(expression.function) + 1
        for _, low, high in expression.limits:
            if not (low.is_Integer and high.is_Integer and abs(high - low) < LONGEST_SUM):
                raise Unreadable("a sum of too many terms")
    else:
        sizes = [_size(argument) for argument in expression.args]
        size = sum(sizes) + 1
        if isinstance(expression, (sympy.Pow, sympy.exp, sympy.factorial)) and sizes[-1] > 4:
            size = LARGEST + 1.0 if not expression.args[-1].free_symbols else size
        elif isinstance(expression, sympy.Pow) and expression.exp.is_number:
            size = sizes[0] * (abs(float(expression.exp)) + 1)
        elif isinstance(expression, sympy.factorial):
            size = 4.0 * 10 ** sizes[0] if expression.args[0].is_number else size
    if size > LARGEST:
        raise Unreadable("too large to evaluate")
    return size


def _agree(first: sympy.Expr, second: sympy.Expr) -> bool:
    symbols = first.free_symbols | second.free_symbols
    if (
        not symbols
        and (exactly := [value.doit() for value in (first, second)])
        and all(v.is_Rational for v in exactly)
    ):
        return bool(exactly[0] == exactly[1])
    known, real = [], []
    for point in _points(first, second):
        a, b = _value(first, point), _value(second, point)
        if a is not None and b is not None:
            known.append((a, b))
            if a.is_real and b.is_real and _in_real_domain(first, point) and _in_real_domain(second, point):
                real.append((a, b))
    chosen = real or known
    enough = 2 if symbols else 1
    return len(chosen) >= enough and all(_close(a, b) for a, b in chosen)


def _in_real_domain(expression: sympy.Expr, point: dict[Any, sympy.Rational]) -> bool:
    """Whether no root and no logarithm of a negative number is taken."""
    bases = [
        power.base
        for power in expression.atoms(sympy.Pow)
        if power.exp.is_Rational and not power.exp.is_Integer
    ]
    bases += [logarithm.args[0] for logarithm in expression.atoms(sympy.log)]
    values = [_value(base, point) for base in bases if base.free_symbols]
    return not any(value is None or (value.is_real and value < 0) for value in values)


def _points(first: sympy.Expr, second: sympy.Expr) -> list[dict[Any, sympy.Rational]]:
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    if not symbols:
        return [{}]
    return [
        {symbol: sympy.Rational(p * PRIMES[i % len(PRIMES)] + (i > 0), q) for i, symbol in enumerate(symbols)}
        for p, q in POINTS
    ]


def _value(expression: sympy.Expr, point: dict[Any, sympy.Rational]) -> Any:
    """The value to DIGITS digits, or None if there is none."""
    try:
        value = sympy.N(_at(expression, point), DIGITS)
    except Exception:
        return None
    parts = value.as_real_imag() if value.is_number else ()
    if not parts or not all(part.is_Number and part.is_finite for part in parts):
        return value if value in (sympy.oo, -sympy.oo) else None
    real, imaginary = (0 if part.is_Float and known_bits(part) < 20 else part for part in parts)
    scale = abs(real) + abs(imaginary)
    real, imaginary = (0 if abs(part) < AGREEING * scale else part for part in (real, imaginary))
    return real + sympy.I * imaginary


def _at(expression: Any, point: dict[Any, sympy.Rational]) -> Any:
    """`expression` with the numbers of `point`; raises `Unreadable` for a power that is too large."""
    if not expression.args or not expression.free_symbols:
        return point.get(expression, expression)
    arguments = [_at(argument, point) for argument in expression.args]
    if isinstance(expression, (sympy.Pow, sympy.exp, sympy.factorial)):
        exponent = arguments[-1]
        if exponent.is_number and not abs(sympy.N(exponent)) < LARGEST_EXPONENT:
            raise Unreadable("too large to evaluate")
    return expression.func(*arguments)


def _close(a: Any, b: Any) -> bool:
    if a == b or not (a.is_finite and b.is_finite):
        return bool(a == b)
    return bool(abs(a - b) <= AGREEING * max(abs(a), abs(b)))


def _rounded(decimal: Tokens, value: sympy.Expr) -> bool:
    """Whether `decimal` is a decimal with enough places that `value` rounds to."""
    negative, literal = len(decimal) > 1 and decimal[0].text == "-", decimal[-1]
    if (
        literal.kind != "number"
        or len(decimal) > 1 + negative
        or value.free_symbols
        or "e" in literal.text.lower()
    ):
        return False
    places = len(literal.text.partition(".")[2])
    if places < ROUNDED_PLACES or "(" in literal.text or len(literal.text.strip("0.")) < ROUNDED_PLACES:
        return False
    number, found = exact(literal.text) * (-1 if negative else 1), _value(value, {})
    if found is None or not found.is_real or found in (sympy.oo, -sympy.oo):
        return False
    return bool(
        abs(found - sympy.Rational(number.numerator, number.denominator)) < sympy.Rational(1, 10**places)
    )
