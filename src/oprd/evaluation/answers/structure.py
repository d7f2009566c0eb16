"""From tokens to the kind of answer that they state: the first reader that knows them decides."""

import re

from oprd.evaluation.answers.brackets import CLOSING, OPENING, closing, split
from oprd.evaluation.answers.kinds import (
    Answer,
    Choice,
    Collection,
    Matrix,
    Named,
    Other,
    Quantity,
    Relation,
    SetOf,
    Words,
)
from oprd.evaluation.answers.names import is_name
from oprd.evaluation.answers.prose import trimmed
from oprd.evaluation.answers.quantities import number_words, quantity, second_quantity
from oprd.evaluation.answers.tokens import Token, Tokens, render
from oprd.evaluation.answers.vocabulary import (
    ARTICLES,
    NOTHING,
    OTHER_RELATIONS,
    REALS,
    RELATIONS,
    SEPARATORS,
    VERDICTS,
)

MAX_SIGNS = 4


def understand(tokens: Tokens) -> Answer:
    """The answer that `tokens` state."""
    tokens = trimmed(tokens)
    for reader in (
        _choice,
        _unbalanced,
        _words,
        _date,
        _list,
        _related,
        _signs,
        _set,
        _bracketed,
        _matrix,
        _ratio,
        _compound,
        quantity,
    ):
        if (answer := reader(tokens)) is not None:
            return answer
    return Other(render(tokens))


def _choice(tokens: Tokens) -> Answer | None:
    r"""(C), C), C. text, C - text, (C) text, or "option C"."""
    texts = [token.text for token in tokens]
    if texts[:1] in (["option"], ["choice"], ["answer"]):
        return _choice(tokens[1:]) or (
            Choice(texts[1].upper(), None) if len(texts) == 2 and len(texts[1]) == 1 else None
        )
    start = 1 if texts[:1] == ["("] else 0
    if len(texts) < start + 2 or tokens[start].kind != "letter" or texts[start].upper() not in "ABCDEFGHIJ":
        return None
    mark, rest = texts[start + 1], tokens[start + 2 :]
    letter = texts[start]
    upper = letter.isupper() or (letter in "abcde" and not rest)
    marked = mark == ")" or (not start and mark in (".", ":") and rest and rest[0].spaced)
    marked = marked or (not start and mark == "-" and tokens[1].spaced and rest and rest[0].kind == "word")
    if not (marked and upper) or (rest and not start and mark == ")" and rest[0].text in OPENING):
        return None
    if rest and start and not rest[0].spaced and rest[0].kind not in ("word", "number"):
        return None  # a product or a power of (A)
    return Choice(letter.upper(), understand(rest) if rest else None)


def _unbalanced(tokens: Tokens) -> Answer | None:
    """(73 and 73) without the stray bracket."""
    if len(tokens) > 1 and tokens[0].text in ("(", "[") and closing(tokens, 0) == len(tokens):
        return understand(tokens[1:])
    texts = [token.text for token in tokens]
    if len(tokens) > 1 and texts[-1] in (")", "]") and not set(texts[:-1]) & {"(", "[", "]"}:
        return understand(tokens[:-1])
    return None


def _words(tokens: Tokens) -> Answer | None:
    texts = [token.text for token in tokens]
    if (
        texts
        and texts[0] in VERDICTS
        and not VERDICTS & set(texts[1:])
        and (len(texts) == 1 or texts[1] in ",.:;-")
    ):
        return Words(texts[0])
    if any(token.kind not in ("word", "letter") and token.text not in "-'.!?/&" for token in tokens):
        return None
    letters = "".join(texts)
    if not any(token.kind == "word" for token in tokens):
        if any(token.kind != "letter" for token in tokens) or len(tokens) < 2:
            return None
        product = (
            letters.islower() and not set(letters) & set("eiou") and (len(letters) == 2 or "a" not in letters)
        )
        return None if product else Words(letters.lower(), tokens)
    if (
        number_words(tokens)
        or {"and", "or"} & set(texts)
        or (texts[0] in {"negative", "minus"} and number_words(tokens[1:]))
    ):
        return None
    return _named_words([token.text.lower() for token in tokens])


def _named_words(texts: list[str]) -> Answer:
    texts = texts[1:] if texts[0] in ARTICLES and len(texts) > 1 else texts
    text = "".join(word for word in texts if word not in "-'.!?")
    if text in NOTHING or text in REALS:
        return SetOf("", (), r"\emptyset" if text in NOTHING else r"\mathbb{R}")
    return Words(text)


def _date(tokens: Tokens) -> Answer | None:
    """2024-05-06 or 5/6/2024, which is no difference and no quotient."""
    texts = [token.text for token in tokens]
    numbers, marks = texts[::2], texts[1::2]
    if len(texts) != 5 or marks not in (["-"] * 2, ["/"] * 2) or not all(map(str.isdecimal, numbers)):
        return None
    digits = [len(number) for number in numbers]
    if sorted(digits)[1:] not in ([1, 4], [2, 4]) or digits[1] == 4 or any(t.spaced for t in tokens[1:]):
        return None
    return Words(marks[0].join(number.lstrip("0") for number in numbers))


def _list(tokens: Tokens) -> Answer | None:
    groups = next((g for mark in (";", "or") if len((g := split(tokens, {mark}))[0]) > 1), None)
    parts, found = groups or split(tokens, SEPARATORS)
    if len(parts) < 2:
        return None
    items: list[Answer] = []
    for part in filter(None, parts):
        item = understand(part)
        if not isinstance(item, Collection) or item.brackets:
            items.append(item)
        elif ";" in found or all(isinstance(inner, Named) for inner in item.items):  # 1, 2; 3, 4
            items.append(Collection("()", item.items))
        else:
            items += item.items
    if any(isinstance(item, Other) for item in items) or len(items) < 2:
        return Other(render(tokens)) if len(items) != 1 else items[0]
    first, *others = items
    if isinstance(first, Named) and not any(isinstance(item, (Named, Relation)) for item in others):
        return Named(first.name, Collection("", [first.value, *others]))
    if isinstance(first, Relation) and first.signs == [r"\ne"]:  # x != 1, -1
        items = [first, *(_unequal(first, item) for item in others)]
    named = [item for item in items if isinstance(item, Named)]
    if len(named) == len(items) and len({render(item.name) for item in named}) == 1:  # x = 1 or x = 2
        return Named(named[0].name, Collection("", [item.value for item in named]))
    return Collection("", items, joined_by_or="or" in found)


def _unequal(relation: Relation, value: Answer) -> Answer:
    """`relation`, of two different sides, with `value` on the right."""
    return (
        Relation([relation.parts[0], value.tokens], relation.signs) if isinstance(value, Quantity) else value
    )


def _related(tokens: Tokens) -> Answer | None:
    parts, signs = split(tokens, RELATIONS)
    if split(tokens, OTHER_RELATIONS)[1]:
        return Other(render(tokens))
    if not signs:
        return _point(tokens)
    if not all(parts):
        return Other(render(tokens))
    if signs == [r"\in"] or set(signs) == {"="}:
        first, last = parts[0], parts[-1]
        if is_name(first):
            return Named(first, understand(last))
        if is_name(last) and len(parts) == 2:
            return Named(last, understand(first))
    if r"\in" in signs:
        return Other(render(tokens))
    measured = [quantity(part) for part in parts]
    bare = [m.tokens if m and m.unit else part for m, part in zip(measured, parts, strict=True)]
    relation = Relation(bare, signs)
    if signs == [r"\ne"] and isinstance(values := _signs(parts[1]), Collection):  # x != +-1
        return Collection("", [_unequal(relation, value) for value in values.items])
    return relation


def _point(tokens: Tokens) -> Answer | None:
    """A(3, -2)."""
    if len(tokens) > 3 and tokens[0].kind == "letter" and tokens[0].text.isupper() and tokens[1].text == "(":
        place = _bracketed(tokens[1:])
        return Named(tokens[:1], place) if isinstance(place, Collection) else None
    return None


def _signs(tokens: Tokens) -> Answer | None:
    r"""Every \pm once with each sign; \mp has the opposite of the first one's."""
    places = [i for i, token in enumerate(tokens) if token.text in (r"\pm", r"\mp")]
    if not places or (tokens[0].text == r"\{" and closing(tokens, 0) == len(tokens) - 1):
        return None
    free = [i for n, i in enumerate(places) if tokens[i].text == r"\pm" or n == 0]
    if len(free) > MAX_SIGNS:
        return Other(render(tokens))
    items: list[Answer] = []
    for choice in range(2 ** len(free)):
        sign = {i: "+-"[(choice >> n) & 1] for n, i in enumerate(free)}
        opposite = "-" if sign[free[0]] == "+" else "+"
        variant = [Token("mark", sign.get(i, opposite)) if i in places else t for i, t in enumerate(tokens)]
        items.append(understand(variant[1:] if variant[0].text == "+" else variant))
    return Other(render(tokens)) if any(isinstance(item, Other) for item in items) else Collection("", items)


def _set(tokens: Tokens) -> Answer | None:
    if [token.text for token in tokens] == [r"\{", r"\}"]:
        return SetOf("", (), r"\emptyset")
    if len(tokens) == 1 and (tokens[0].text.startswith(r"\mathbb") or tokens[0].text == r"\emptyset"):
        return SetOf("", (), tokens[0].text)
    for operation in (r"\setminus", r"\cup", r"\cap"):
        parts, found = split(tokens, {operation})
        if found:
            return (
                SetOf(operation, [understand(part) for part in parts])
                if all(parts)
                else Other(render(tokens))
            )
    parts, found = split(tokens, {"-"})
    if found and all(parts) and parts[0][0].text.startswith(r"\mathbb"):  # R - {0}
        return SetOf(r"\setminus", [understand(part) for part in parts])
    return None


def _bracketed(tokens: Tokens) -> Answer | None:
    if (
        len(tokens) < 3
        or tokens[0].text not in {"(", "[", r"\{", r"\langle"}
        or closing(tokens, 0) < len(tokens) - 1
    ):
        return None
    if tokens[-1].text not in CLOSING:
        return None
    inside = tokens[1:-1]
    brackets = tokens[0].text + tokens[-1].text
    if brackets == r"\{\}":
        condition, found = split(inside, {"|", ":"})
        if len(found) == 1 and isinstance(answer := understand(condition[1]), (Relation, Collection)):
            return answer
    parts, _ = split(inside, {",", ";"})
    if len(parts) < 2 and brackets != r"\{\}":
        return understand(inside) if brackets in ("()", "[]") else Other(render(tokens))
    items = [understand(part) for part in parts]
    if any(isinstance(item, Other) for item in items):
        return Other(render(tokens))
    if brackets == r"\{\}":
        flat = [i.items if isinstance(i, Collection) and not i.brackets else [i] for i in items]
        return Collection(brackets, [item for group in flat for item in group])
    return Collection("()" if brackets == r"\langle\rangle" or len(items) > 2 else brackets, items)


def _matrix(tokens: Tokens) -> Answer | None:
    begins = [token.text for token in tokens if token.text.startswith(r"\begin")]
    if not begins:
        return None
    if not all(re.search("[pb]?matrix|array", text) and "vmatrix" not in text.lower() for text in begins):
        return Other(render(tokens))
    if not tokens[0].text.startswith(r"\begin") or closing(tokens, 0) < len(tokens) - 1:
        return Matrix([], tokens)
    rows, _ = split(tokens[1:-1], {r"\\"})
    return Matrix([split(row, {"&"})[0] for row in rows if row], tokens)


def _ratio(tokens: Tokens) -> Answer | None:
    """3 : 4, or a time such as 7:30 pm."""
    parts, found = split(tokens, {":"})
    if not found:
        return None
    hour, minutes = parts[0][:1], parts[1][:1]
    if [token.kind for token in (*hour, *minutes)] == ["number"] * 2 and len(minutes[0].text) == 2:
        return Words(render(tokens).lstrip("0").replace(" ", ""))
    items = [understand(part) for part in parts]
    return (
        Collection(":", items) if all(isinstance(item, Quantity) for item in items) else Other(render(tokens))
    )


def _compound(tokens: Tokens) -> Answer | None:
    """7 hours 30 minutes, or 7 h 30 min."""
    second = second_quantity(tokens)
    return None if second is None else _list([*tokens[:second], Token("word", "and"), *tokens[second:]])
