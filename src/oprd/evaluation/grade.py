r"""Is a response right? The answer it states is extracted, normalised and compared with the reference."""

import re
import threading
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

TIMEOUT_SECONDS = 5

BRACES = re.compile(r"(?P<box>\\(?:boxed|fbox)\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.S)
ANSWER_LINE = re.compile(
    r"^[ \t>*_#-]*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?[*_\s]*:[*_]*\s*"
    r"(?:(?:\$\$|\\\[)\s*\n\s*)?(\S[^\n]*)",  # display math may open on a line of its own
    re.I | re.M,
)
MATH_DELIMITERS = re.compile(r"\\?\$|(?<!\\)\\[()\[\]]")
WRAPPED_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
MIXED_NUMBER = re.compile(r"(-?\d+)\s+(\d+)/(\d+)")
IN_BASE = re.compile(r"\d+_\d+")
WORDS = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z][A-Za-z' -]*")

REPLACEMENTS = [
    (re.compile(r"\\!\s*"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)(?:\\,|\\ |~)(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\[dt]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right)(?![a-zA-Z.])"), ""),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi"),
    (re.compile(r"_\{(\d+)\}"), r"_\1"),
    (re.compile("°"), r"^\\circ"),
    (re.compile("∞"), r"\\infty"),
    (re.compile("[−\u2013]"), "-"),
    (re.compile(r"\s+"), " "),
]


def extract_answer(response: str) -> str | None:
    r"""The answer that `response` states, or None.

    It is the content of the last complete, non-empty `\boxed{}`, else what follows the last line that
    begins with "Answer:" (Markdown around it allowed). Numbers elsewhere in the text never count.
    """
    boxed = _last_box(response)
    if boxed is not None:
        return boxed
    lines = ANSWER_LINE.findall(response)
    return (lines[-1].strip().strip("*_").strip() or None) if lines else None


def grade(response: str, reference: str) -> bool:
    r"""Whether the answer that `response` states equals `reference`.

    Equality of the normalised strings, else math-verify on both as LaTeX: equal numbers (to 6 decimals),
    expressions, sets, intervals and tuples; units and percent signs are ignored. Words must be the same
    word. The reference may be wrapped in `$` or `\boxed{}`. No answer is wrong, and so is one that
    math-verify cannot compare within 5 seconds; the limit needs the main thread and is off elsewhere.
    """
    answer = extract_answer(response)
    if answer is None:
        return False
    boxed = _last_box(reference)
    return _equivalent(normalize_answer(answer), normalize_answer(reference if boxed is None else boxed))


def normalize_answer(answer: str) -> str:
    """`answer` in a plain spelling: no math delimiters, spacing commands, thousands separators, outer text
    wrapper, trailing period or trailing zeros; a multiple-choice letter without its parentheses."""
    answer = MATH_DELIMITERS.sub("", answer)
    for pattern, replacement in REPLACEMENTS:
        answer = pattern.sub(replacement, answer)
    answer = answer.strip().rstrip(".").strip()
    while wrapped := WRAPPED_TEXT.fullmatch(answer):
        answer = wrapped[1].strip()
    if THOUSANDS.fullmatch(answer):
        answer = answer.replace(",", "")
    answer = re.sub(r"^([+-]?\d+)\.0+$", r"\1", answer)
    answer = re.sub(r"^\(?([A-Z])\)$", r"\1", answer)
    if mixed := MIXED_NUMBER.fullmatch(answer):
        answer = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return answer


def _last_box(text: str) -> str | None:
    r"""Content of the complete, non-empty box that opens last; `\{` and `\}` are no braces."""
    open_braces: list[tuple[int, bool]] = []
    last_start, content = -1, None
    for token in BRACES.finditer(text):
        if token["box"] or token["open"]:
            open_braces.append((token.end(), token["box"] is not None))
        elif token["close"] and open_braces:
            start, is_box = open_braces.pop()
            inside = text[start : token.start()].strip()
            if is_box and inside and start > last_start:
                last_start, content = start, inside
    return content


def _equivalent(answer: str, reference: str) -> bool:
    if answer == reference:
        return answer != ""
    if WORDS.fullmatch(reference):  # as LaTeX they would be products of letters, and anagrams equal
        return answer.casefold() == reference.casefold()
    if IN_BASE.fullmatch(reference) and IN_BASE.fullmatch(answer):  # math-verify ignores the base
        return False
    limit = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    try:
        return verify(_parse(reference, limit), _parse(answer, limit), timeout_seconds=limit)
    except (Exception, TimeoutException):  # whatever a model wrote must not end an evaluation
        return False


def _parse(answer: str, limit: int | None) -> list[Any]:
    return parse(f"${answer}$", [LatexExtractionConfig()], parsing_timeout=limit)
