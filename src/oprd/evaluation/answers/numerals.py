"""Numbers, and the arguments of commands, in one spelling."""

import re
from collections.abc import Iterable
from fractions import Fraction

from oprd.evaluation.answers.brackets import CLOSING, OPENING, closing, depths
from oprd.evaluation.answers.tokens import Token, Tokens, tokenize
from oprd.evaluation.answers.vocabulary import NUMBER_WORDS

NUM_ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, r"\overline": 1}
OPEN, CLOSE, TIMES = Token("mark", "{"), Token("mark", "}"), Token("command", r"\cdot")
REPEATED = re.compile(r"(\d+\.\d*?)(?:(\d)\2\2+|(\d{2,6})\3+)")
LARGEST_EXPONENT = 400


def normal_tokens(answer: str) -> list[Token]:
    """The tokens of `answer` with every number one token, and every argument in braces."""
    return _mixed(_chosen(_braced(_bases(_repeating(_thousands(_crosses(tokenize(answer))))))))


def exact(numeral: str) -> Fraction:
    """The value of a number token: a decimal, 1.5e-3, or 0.1(6) with its period; raises `ValueError`."""
    if "(" in numeral:
        digits, period = numeral[:-1].split("(")
        scale = 10 ** (len(digits) - digits.index(".") - 1)
        return Fraction(digits + "0") + Fraction(int(period), scale * (10 ** len(period) - 1))
    exponent = re.split("[eE]", numeral)[1:]
    if exponent and abs(int(exponent[0])) > LARGEST_EXPONENT:
        raise ValueError(f"{numeral} is out of range")
    return Fraction(numeral + "0" if numeral.endswith(".") else numeral)


def _thousands(tokens: Tokens) -> list[Token]:
    """1,234 and 1 234 as one number; in brackets a comma separates, unless it is written `{,}`."""
    result: list[Token] = []
    in_brackets = 0
    i = 0
    while i < len(tokens):
        token = tokens[i]
        in_brackets += (token.text in OPENING) - (token.text in CLOSING)
        end = i + 1
        if token.kind == "number" and re.fullmatch(r"\d{1,3}", token.text):
            end = _end_of_groups(tokens, i, in_brackets > 0)
            digits = "".join(part.text for part in tokens[i:end] if part.kind == "number")
            token = token._replace(text=digits)
        result.append(token)
        i = end
    return result


def _end_of_groups(tokens: Tokens, start: int, in_brackets: bool) -> int:
    end = start + 1
    while end < len(tokens):
        comma = tokens[end].text in (",", "{,}", "'") and not tokens[end].spaced
        separated = tokens[end].text in ("{,}", "'") or (comma and not in_brackets)
        group = end + 1 if separated else end
        if group >= len(tokens) or tokens[group].kind != "number" or tokens[group].spaced == separated:
            break
        if not re.fullmatch(r"\d{3}(?:\.\d*)?", tokens[group].text):
            return start + 1
        end = group + 1
        if "." in tokens[group].text:
            break
    return end


def _repeating(tokens: Tokens) -> list[Token]:
    r"""0.\overline{3}, 0.\dot{3}, 0.(3) and 0.333... as 0.(3)."""
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        token, rest = tokens[i], tokens[i + 1 :]
        i += 1
        if token.kind == "number" and "." in token.text and rest:
            marked = [t for t in _marked(rest)]
            if marked and (period := "".join(t.text for t in marked if t.text.isdecimal())):
                token, i = token._replace(text=f"{token.text}({period})"), i + len(marked)
            elif rest[0].text == r"\dots" and (parts := REPEATED.fullmatch(token.text)):
                token, i = token._replace(text=f"{parts[1]}({parts[2] or parts[3]})"), i + 1
        result.append(token)
    return result


def _marked(rest: Tokens) -> Tokens:
    """The tokens at the start of `rest` that mark digits as a period."""
    if rest[0].text == r"\overline" and len(rest) > 1:
        return rest[: closing(rest, 1) + 1] if rest[1].text == "{" else rest[:2]
    if rest[0].text == "(" and not rest[0].spaced and [t.text for t in rest[2:3]] == [")"]:
        return rest[:3] if rest[1].text.isdecimal() else []
    if rest[0].text == r"\dot":
        last = max(i for i, token in enumerate(rest) if token.text == r"\dot")
        return rest[: closing(rest, last + 1) + 1] if last + 1 < len(rest) else []
    return []


def _bases(tokens: Tokens) -> list[Token]:
    r""" "52 base 8", "52 (base eight)" and 52_{base 8} as 52_8; a base of ten is left out."""
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        wrapped = tokens[i].text == "(" and [t.text for t in tokens[i + 1 : i + 2]] == ["base"]
        base = i + wrapped
        if tokens[base].text == "base" and base + 1 < len(tokens) and result:
            number = str(NUMBER_WORDS.get(tokens[base + 1].text, tokens[base + 1].text))
            subscript = [t.text for t in result[-2:]] == ["_", "{"]
            result += (
                [Token("number", number)] if subscript else [Token("mark", "_"), Token("number", number)]
            )
            i = base + 2 + wrapped
        else:
            result.append(tokens[i])
            i += 1
    return result


def _braced(tokens: Tokens) -> list[Token]:
    """Arguments in braces, other braces as brackets of a set or of nothing."""
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        i += 1
        if token.text in ("^", "_"):
            argument, i = _argument(tokens, i)
            if token.text == "_" and result and result[-1].kind == "word":  # FF_{16}
                result += [Token("letter", letter) for letter in result.pop().text.upper()]
            if [t.kind for t in argument] == ["word"] and token.text == "^":  # degrees, and the th of 5^{th}
                result += argument
            elif (argument and render_base(argument) != "10") or token.text == "^":
                result += [token, OPEN, *_number_words(argument), CLOSE]
        elif token.text in NUM_ARGUMENTS:
            result.append(token)
            if token.text == r"\sqrt" and i < len(tokens) and tokens[i].text == "[":
                end = closing(tokens, i)
                result += tokens[i : end + 1]
                i = end + 1
            tokens = _digits_apart(tokens, i) if NUM_ARGUMENTS[token.text] == 2 else tokens
            for _ in range(NUM_ARGUMENTS[token.text]):
                argument, i = _argument(tokens, i)
                result += [OPEN, *argument, CLOSE]
            if token.text == r"\overline" and len(argument) > 1 and all(t.text.isupper() for t in argument):
                result[-len(argument) - 3 :] = argument  # the segment AB
        elif token.text == "{":
            end = closing(tokens, i - 1)
            result += _group(_braced(tokens[i:end]))
            i = end + 1
        elif token.text != "}":
            result.append(token)
    return result


def render_base(argument: Iterable[Token]) -> str:
    return "".join(token.text for token in _number_words(argument))


def _number_words(tokens: Iterable[Token]) -> list[Token]:
    return [
        Token("number", str(NUMBER_WORDS[t.text])) if t.kind == "word" and t.text in NUMBER_WORDS else t
        for t in tokens
    ]


def _group(inside: list[Token]) -> list[Token]:
    inside = _chosen(inside)
    if any(token.text == "," and not depth for token, depth in zip(inside, depths(inside), strict=True)):
        return [Token("mark", r"\{"), *inside, Token("mark", r"\}")]
    return inside if len(inside) < 2 else [Token("mark", "("), *inside, Token("mark", ")")]


def _chosen(tokens: list[Token]) -> list[Token]:
    r"""n \choose k as \binom{n}{k}."""
    texts = [token.text for token in tokens]
    if r"\choose" not in texts:
        return tokens
    at = texts.index(r"\choose")
    return [Token("command", r"\binom"), OPEN, *tokens[:at], CLOSE, OPEN, *tokens[at + 1 :], CLOSE]


def _argument(tokens: Tokens, i: int) -> tuple[list[Token], int]:
    """What a command, `^` or `_` applies to, and where it ends; in plain text it may stand in parentheses."""
    if i >= len(tokens):
        return [], i
    text = tokens[i].text
    if text in ("{", "("):
        end = closing(tokens, i)
        return _braced(tokens[i + 1 : end]), end + 1
    if text in ("+", "-"):
        argument, end = _argument(tokens, i + 1)
        return [tokens[i], *argument], end
    if text in NUM_ARGUMENTS:
        end = i + 1
        for _ in range(NUM_ARGUMENTS[text]):
            _, end = _argument(tokens, end)
        return _braced(tokens[i:end]), end
    return [tokens[i]], i + 1


def _digits_apart(tokens: Tokens, i: int) -> list[Token]:
    r"""\frac12 is \frac{1}{2}: TeX reads one digit as an argument."""
    end = closing(tokens, i) + 1 if i < len(tokens) and tokens[i].text == "{" else i
    if end < len(tokens) and (number := tokens[end]).kind == "number" and number.text.isdecimal():
        first = 2 if end == i else 1
        digits = [*number.text[:first], number.text[first:]]
        return [*tokens[:end], *(Token("number", d) for d in digits if d), *tokens[end + 1 :]]
    return list(tokens)


def _mixed(tokens: Tokens) -> list[Token]:
    r"""1\frac{4}{5} and 1 4/5 as a sum in parentheses."""
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        after = [token.text for token in tokens[i + 1 : i + 8]]
        part: list[Token] = []
        if tokens[i].kind == "number" and tokens[i].text.isdecimal():
            if (
                len(after) > 6
                and after[0] == r"\frac"
                and after[1::3] == ["{", "{"]
                and after[3::3] == ["}", "}"]
            ):
                part = _proper(after[2], after[5])
                length = 8
            elif len(after) > 2 and after[1] == "/" and tokens[i + 1].spaced:
                part = _proper(after[0], after[2])
                length = 4
        if part and (not result or result[-1].text != "^"):
            result += [
                Token("mark", "(", tokens[i].spaced),
                tokens[i],
                Token("mark", "+"),
                *part,
                Token("mark", ")"),
            ]
            i += length
        else:
            result.append(tokens[i])
            i += 1
    return result


def _proper(above: str, below: str) -> list[Token]:
    if not (above.isdecimal() and below.isdecimal() and len(below) < 10 and int(above) < int(below)):
        return []
    return [
        Token("command", r"\frac"),
        OPEN,
        Token("number", above),
        CLOSE,
        OPEN,
        Token("number", below),
        CLOSE,
    ]


def _crosses(tokens: Tokens) -> list[Token]:
    """The x of 5 x 10^3 as a sign."""
    result = list(tokens)
    for i in range(1, len(tokens) - 1):
        token, after = tokens[i], tokens[i + 1]
        if token.text in ("x", "X") and tokens[i - 1].kind == after.kind == "number":
            result[i] = TIMES if token.spaced or after.text == "10" else token
    return result
