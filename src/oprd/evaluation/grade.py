r"""Is a response right? The answer it states is read and compared with the reference.

`answers.extract` finds it, `.tokens` and `.numerals` bring it into one spelling, `.structure` says what kind
of thing it is, `.expressions` compares values, and `.equality` has the rules (docs/evaluation.md).
"""

import threading
from collections.abc import Sequence

from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from oprd.evaluation.answers.brackets import depths
from oprd.evaluation.answers.equality import same
from oprd.evaluation.answers.expressions import Unreadable
from oprd.evaluation.answers.extract import extract_answer, unboxed
from oprd.evaluation.answers.kinds import Choice, Named, Quantity, Words
from oprd.evaluation.answers.numerals import normal_tokens
from oprd.evaluation.answers.structure import understand
from oprd.evaluation.answers.tokens import Token, Tokens, render

__all__ = ["extract_answer", "grade", "normalize_answer"]

TIMEOUT_SECONDS = 5
LONGEST = 1000  # characters of an answer that is read; longer ones are equal to the same text alone
DEEPEST = 10  # brackets in brackets


def grade(response: str, reference: str) -> bool:
    """Whether the answer that `response` states equals `reference`; no answer, or no text, is wrong.

    A comparison takes at most 5 seconds, then the answer is wrong. That limit is math-verify's and needs the
    main thread; elsewhere only the bounds on what is evaluated at all hold.
    """
    if not (isinstance(response, str) and isinstance(reference, str)):
        return False
    answer = extract_answer(response)
    return answer is not None and equivalent(answer, unboxed(reference))


def equivalent(answer: str, reference: str) -> bool:
    """Whether two answers are the same."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        return bool(timeout(TIMEOUT_SECONDS if in_main_thread else None)(_equivalent)(answer, reference))
    except (Exception, TimeoutException):  # whatever a model wrote must not end an evaluation
        return False


def normalize_answer(answer: str) -> str:
    """A spelling that answers share if they differ in how they are written down, in a unit or in a name."""
    try:
        tokens = _read(answer)
    except Unreadable:
        return " ".join(answer.split())
    meant = understand(tokens)
    meant = meant.value if isinstance(meant, Named) else meant
    match meant:
        case Choice(letter=text) | Words(text=text):
            return text
        case Quantity(tokens=core):
            return render(core)
    return render(tokens)


def _equivalent(answer: str, reference: str) -> bool:
    if " ".join(answer.split()) == " ".join(reference.split()):
        return bool(answer.strip())
    try:
        given, wanted = _read(answer), _read(reference)
    except Unreadable:
        return False
    if not given or not wanted:
        return False
    return render(given) == render(wanted) or any(
        same(understand(g), understand(w)) for g in _approximated(given) for w in _approximated(wanted)
    )


def _read(answer: str) -> list[Token]:
    if len(answer) > LONGEST:
        raise Unreadable("too long")
    tokens = normal_tokens(answer)
    if max(depths(tokens), default=0) > DEEPEST:
        raise Unreadable("too deep")
    return tokens


def _approximated(tokens: Tokens) -> Sequence[Tokens]:
    r"""Both sides of a \approx b."""
    texts = [token.text for token in tokens]
    if texts.count(r"\approx") != 1:
        return [tokens]
    at = texts.index(r"\approx")
    return [part for part in (tokens[:at], tokens[at + 1 :]) if part]
