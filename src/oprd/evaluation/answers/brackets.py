"""Brackets: where they close, how deep a token stands, and what is separated outside them."""

from oprd.evaluation.answers.tokens import Token, Tokens

OPENING = {"(", "[", r"\{", r"\langle", r"\lfloor", r"\lceil"}
CLOSING = {")", "]", r"\}", r"\rangle", r"\rfloor", r"\rceil"}


def depths(tokens: Tokens) -> list[int]:
    """How many brackets and braces are open around each token."""
    result, depth = [], 0
    for token in tokens:
        closes = token.text in CLOSING or token.text == "}" or token.text.startswith(r"\end")
        depth -= closes and depth > 0
        result.append(depth)
        depth += token.text in OPENING or token.text == "{" or token.text.startswith(r"\begin")
    return result


def closing(tokens: Tokens, start: int) -> int:
    """Index of the token that closes the bracket or brace at `start`; the number of tokens if none does."""
    depth = 0
    for i in range(start, len(tokens)):
        text = tokens[i].text
        depth += text in OPENING or text == "{" or text.startswith(r"\begin")
        depth -= text in CLOSING or text == "}" or text.startswith(r"\end")
        if depth == 0:
            return i
    return len(tokens)


def split(tokens: Tokens, separators: set[str]) -> tuple[list[Tokens], list[str]]:
    """The parts of `tokens` between separators outside brackets, and these separators."""
    parts: list[list[Token]] = [[]]
    found = []
    for token, depth in zip(tokens, depths(tokens), strict=True):
        if depth == 0 and token.text in separators:
            parts.append([])
            found.append(token.text)
        else:
            parts[-1].append(token)
    return list(parts), found
