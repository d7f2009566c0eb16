"""Whether the left side of an equation is the name of what is asked for."""

from oprd.evaluation.answers.brackets import depths
from oprd.evaluation.answers.tokens import Token, Tokens
from oprd.evaluation.answers.vocabulary import GREEK


def is_name(tokens: Tokens) -> bool:
    """A variable with or without subscript and prime, f(x), |AB|, words, or a tuple of variables."""
    texts = [token.text for token in tokens]
    if texts[1:6] == ["^", "{", "-", "1", "}"] and (texts[6:7] == ["("] or texts[0].isupper()):  # f^{-1}(x)
        tokens, texts = [tokens[0], *tokens[6:]], [texts[0], *texts[6:]]
    kinds = {token.kind for token in tokens}
    if r"\frac" in texts or "/" in texts:  # AB/CD
        return all(
            t.text in (r"\frac", "/", "{", "}") or (t.kind == "letter" and t.text.isupper()) for t in tokens
        )
    variables = [
        t
        for t, depth in zip(tokens, depths(tokens), strict=True)
        if t.kind in ("letter", "word") or _is_greek(t)
    ]
    if "number" in kinds and "_" not in texts and "(" not in texts:
        return False
    if not variables or set(texts) & {"+", "-", "/", r"\cdot", r"\frac", r"\sqrt", "!"}:
        return False
    if "^" in texts and "'" not in texts:
        return False
    plain = [
        t
        for t, depth in zip(tokens, depths(tokens), strict=True)
        if depth == 0 and (t.kind == "letter" or _is_greek(t))
    ]
    single = len(plain) <= 1 or all(t.text.isupper() for t in plain if t.kind == "letter")
    return single and not any(token.kind == "number" for token in tokens[:1])


def _is_greek(token: Token) -> bool:
    return token.kind == "command" and token.text[1:] in GREEK
