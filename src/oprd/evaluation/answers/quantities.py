"""Numbers and expressions with a unit, a percent sign or other words around them."""

from itertools import pairwise

from oprd.evaluation.answers.kinds import Quantity
from oprd.evaluation.answers.tokens import Token, Tokens
from oprd.evaluation.answers.vocabulary import (
    CURRENCY_WORDS,
    LINKING,
    MEANINGFUL,
    MULTIPLES,
    NO_UNITS,
    NUMBER_WORDS,
    PERCENT,
    UNIT_LETTERS,
    UNITS,
)

TRIGONOMETRIC = {r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc"}
PI_BY_180 = [Token("command", r"\pi"), Token("mark", "/"), Token("number", "180")]


def quantity(tokens: Tokens) -> Quantity | None:
    """An expression with words or a percent sign around it that leave its value as it is."""
    tokens, unit = _without_degrees(tokens)
    while tokens and tokens[0].kind == "word":
        if tokens[0].text in {"negative", "minus"}:
            tokens = [Token("mark", "-"), *tokens[1:]]
        elif number := number_words(tokens):
            tokens = [Token("number", str(number[0])), *tokens[number[1] :]]
        elif tokens[0].text in LINKING or _unit(tokens[0].text) in CURRENCY_WORDS:
            unit |= {_unit(tokens[0].text)} & CURRENCY_WORDS
            tokens = tokens[2:] if [t.text for t in tokens[1:2]] == ["."] else tokens[1:]
        else:
            return None
    if tokens[:1] and tokens[0].text == "-" and (number := number_words(tokens[1:])):
        tokens = [tokens[0], Token("number", str(number[0])), *tokens[1 + number[1] :]]
    end = next((i for i, t in enumerate(tokens) if t.kind == "word"), len(tokens))
    core, tail = list(tokens[:end]), list(tokens[end:])
    while tail and tail[0].text in MULTIPLES:
        core = [*core, Token("command", r"\cdot"), Token("number", str(MULTIPLES[tail.pop(0).text]))]
    percent = bool(core and core[-1].text == "%") or bool(tail and tail[0].text in PERCENT)
    core = core[:-1] if core and core[-1].text == "%" else core
    tail = tail[1:] if tail and tail[0].text in PERCENT else tail
    if not core or any(token.text == "%" for token in core) or not is_unit(tail):
        return None
    alone = _before_letters(core)
    letters = frozenset(_unit_words(core[len(alone) :])) if alone else frozenset()
    return Quantity(core, frozenset(unit | _unit_words(tail)), percent, alone, letters)


def _without_degrees(tokens: Tokens) -> tuple[Tokens, set[str]]:
    r"""Degree signs as pi/180 where there is a sine, and those inside a sum as the unit of all of it.

    The signs of 20^\circ and of 20^\circ C stay: they are a unit as any other.
    """
    in_radians = any(token.text in TRIGONOMETRIC for token in tokens)
    result: list[Token] = []
    unit: set[str] = set()
    for i, token in enumerate(tokens):
        after = tokens[i + 1 : i + 2]
        if token.text != "degree" or not result:
            result.append(token)
        elif in_radians and result[-1].kind in ("number", "letter"):
            result[-1:] = [Token("mark", "("), result[-1], *PI_BY_180, Token("mark", ")")]
        elif after and not _is_scale(after[0]):
            unit.add("degree")
        else:
            result.append(token)
    return result, unit


def _is_scale(token: Token) -> bool:
    return token.kind == "word" or token.text in ("C", "F")


def number_words(tokens: Tokens) -> tuple[int, int] | None:
    """The number that words at the start of `tokens` name, and how many they are."""
    texts = [token.text for token in tokens if token.text != "-"]
    if not texts or texts[0] not in NUMBER_WORDS:
        return None
    first, hyphen = NUMBER_WORDS[texts[0]], len(tokens) > 1 and tokens[1].text == "-"
    second = NUMBER_WORDS.get(texts[1], 0) if len(texts) > 1 else 0
    if first >= 20 and 0 < second < 10:
        return first + second, 2 + hyphen
    return (first, 1) if not hyphen else None


def is_unit(tail: Tokens) -> bool:
    exponent = {"^", "{", "}", "1", "2", "3", "/", "-", ".", "(", ")", "'", r"\cdot", "st", "nd", "rd", "th"}
    counts = any(a.kind == "word" and b.kind == "number" and b.spaced for a, b in pairwise(tail))  # 1 of 3
    return all(
        not is_meaningful(token) if token.kind == "word" else token.kind == "letter" or token.text in exponent
        for token in tail
    ) and not (counts or (tail and tail[-1].text in ("-", "/")))


def is_meaningful(token: Token) -> bool:
    return token.text in MEANINGFUL or singular(token.text) in MEANINGFUL


def singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _unit_words(tail: Tokens) -> set[str]:
    words: list[str] = []
    for token in tail:
        if token.kind in ("word", "letter"):
            words.append(_unit(token.text))
        elif token.kind == "number" and words:
            words[-1] += token.text
    return {word for word in words if word not in NO_UNITS}


def _unit(word: str) -> str:
    return UNITS.get(word) or UNITS.get(singular(word)) or singular(word)


def _before_letters(core: Tokens) -> Tokens:
    """`core` up to a letter that may be a unit: behind a number and a space, before units alone."""
    for i in range(1, len(core)):
        if core[i].kind == "letter" and core[i].spaced and core[i].text in UNIT_LETTERS:
            return core[:i] if _ends_number(core[i - 1]) and is_unit(core[i:]) else ()
    return ()


def _ends_number(token: Token) -> bool:
    return token.kind == "number" or token.text in ("}", ")")


def second_quantity(tokens: Tokens) -> int | None:
    """Where the second of two quantities begins, as in 7 hours 30 minutes; None if there are no two."""
    last = len(tokens) if tokens and tokens[-1].spaced else len(tokens) - 1  # the 2 of 5 cm2 is an exponent
    for i in range(2, last):
        if tokens[i].kind == "number" and tokens[i - 1].kind in ("word", "letter"):
            first = quantity(tokens[:i])
            return i if first and (first.unit or first.letters) else None
    return None
