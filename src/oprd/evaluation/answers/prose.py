"""What stands around an answer and says nothing about it: punctuation, quotes, "the answer is"."""

from oprd.evaluation.answers.quantities import is_meaningful, singular
from oprd.evaluation.answers.tokens import Token, Tokens
from oprd.evaluation.answers.vocabulary import LINKING, SO


def trimmed(tokens: Tokens) -> Tokens:
    """Without punctuation at the ends, words in parentheses, and prose that says "the answer is"."""
    if len(tokens) > 2 and tokens[0].text == tokens[-1].text == "'":
        tokens = tokens[1:-1]
    while tokens and tokens[-1].text in {".", ",", ";", ":", "?"}:
        tokens = tokens[:-1]
    if tokens and tokens[-1].kind == "number":
        tokens = [*tokens[:-1], tokens[-1]._replace(text=tokens[-1].text.rstrip("."))]
    while tokens and tokens[0].text in {".", ",", ";", ":", "=", r"\approx", r"\to"}:
        tokens = tokens[1:]
    if tokens and tokens[-1].text == "!" and tokens[-2:-1] and tokens[-2].kind == "word":
        tokens = tokens[:-1]
    tokens = _without_prose(tokens)
    if len(tokens) > 2 and tokens[0].text == "]":  # ]1,2] is French for (1,2]
        tokens = [Token("mark", "("), *tokens[1:]]
    if len(tokens) > 2 and tokens[-1].text == "[":
        tokens = [*tokens[:-1], Token("mark", ")")]
    if len(tokens) > 2 and tokens[-1].text == ")":
        start = next(i for i in reversed(range(len(tokens))) if i == 0 or tokens[i].text == "(")
        inside = tokens[start + 1 : -1]
        aside = all(t.kind == "word" and not is_meaningful(t) for t in inside)
        if start and inside and (aside or inside[0].text == "or"):
            tokens = [*tokens[:start], *inside]
    return tokens


def _without_prose(tokens: Tokens) -> Tokens:
    label = next((i for i, token in enumerate(tokens) if token.kind != "word"), 0)
    if label and tokens[label].text in (":", ",") and len(tokens) > label + 1:
        labels = (
            not any(map(is_meaningful, tokens[:label])) if tokens[label].text == ":" else tokens[0].text in SO
        )
        tokens = tokens[label + 1 :] if labels else tokens
    verbs = [
        i
        for i, token in enumerate(tokens)
        if token.kind == "word" and LINKING & {token.text, singular(token.text)}
    ]
    for verb in reversed(verbs):
        before, after = tokens[:verb], tokens[verb + 1 :]
        if after and all(t.kind in ("word", "letter") and not is_meaningful(t) for t in before):
            return after
    return tokens
