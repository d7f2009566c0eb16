r"""An answer as tokens, the same ones however it is written.

Unicode, Markdown, plain text and the many LaTeX spellings of one thing give the same tokens. Words, in
\text{} or not, are tokens of their own; letters outside words are variables.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from oprd.evaluation.answers.vocabulary import COMMANDS, DROPPED, SHORT_WORDS, SPELLINGS, SYMBOLS

QUOTE, UNQUOTE = "\ue000", "\ue001"  # private use: they hold the content of \text{}
DOLLAR = f" {QUOTE}dollar{UNQUOTE} "


Kind = Literal["number", "letter", "word", "command", "mark"]


class Token(NamedTuple):
    """`spaced`: whether a space stands before it."""

    kind: Kind
    text: str
    spaced: bool = False


Tokens = Sequence[Token]

TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|tt|sf|normal|up)?|mbox|hbox|emph|mathrm|operatorname\*?)\s*\{([^{}]*)\}"
)
EMPHASIS = re.compile(r"(?<![\w)}\]*])(\*{1,3}|_{1,3}|~~)(?=[^\s*_])(.+?)(?<=[^\s*_])\1(?![\w({\[*])", re.S)
NAME = re.compile(r"[A-Z](?=[a-z]?[aeiouy])[a-z]{2}|[AEIOU][a-z]{2}")  # Tom, May, Ann
VULGAR = re.compile("[¼-¾⅐-⅞]")
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ]+")
LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₖₓ]+")
LEXEME = re.compile(
    rf"""(?P<nothing>\\!\s*|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])\s*(?:\.(?!\d))?)
    |(?P<space>(?:\s|~|\\[,;:>\ ])+|\\[hv]space\s*\{{[^{{}}]*\}})
    |{QUOTE}(?P<quoted>[^{UNQUOTE}]*){UNQUOTE}
    |(?P<number>(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+(?![\w.]))?)
    |(?P<environment>\\(?:begin|end)\s*\{{\s*[a-zA-Z]+\*?\s*\}}(?:\{{[clr|\s]*\}})?)
    |(?P<blackboard>\\mathbb\s*\{{?\s*[A-Z]\s*\}}?)
    |(?P<letters>[a-zA-Z]+)
    |(?P<other>\\(?:[a-zA-Z]+|.)|\{{,\}}|\*\*|[<>!]=|\+/-|\.\.+|&&|\|\||.)""",
    re.X | re.S,
)


def tokenize(answer: str) -> list[Token]:
    """The tokens of `answer`, without spaces."""
    tokens: list[Token] = []
    spaced = False
    for match in LEXEME.finditer(_plain(answer)):
        read = list(_read(match))
        if read:
            read[0] = read[0]._replace(spaced=spaced or read[0].spaced)
        tokens += read
        ends_in_space = match.lastgroup == "space" or (match["quoted"] or "").endswith(" ")
        spaced = ends_in_space or (spaced and not read)
    return tokens


def render(tokens: Iterable[Token]) -> str:
    """`tokens` as text that is the same for the same tokens."""
    return " ".join(token.text for token in tokens)


def _plain(answer: str) -> str:
    """`answer` in ASCII, without Markdown and math delimiters; what stands in \\text{} is quoted."""
    text = answer.replace("`", "")
    if r"\begin" not in text:  # escaped twice, as in JSON
        text = re.sub(r"\\\\(?=[a-zA-Z(\[{])", r"\\", text)
    for _ in range(3):
        text = EMPHASIS.sub(r"\2", text)
    text = re.sub(r"\\(?:text)?color\s*\{[^{}]*\}", "", _ascii(text.strip("*_ \n")))
    text = re.sub(r"(?<![\w)}])-\s*(\\?\$)(?=\s*[\d.])", r"\1-", text)  # -$5 is $-5
    text = text.replace(r"\$", DOLLAR)
    text = text.replace("$", DOLLAR if text.count("$") == 1 else " ")
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    text = re.sub(r"\\\\\s*\[[\d.]+[a-z]{2}\]", r"\\\\", text)  # space between two rows
    text = re.sub(r"\b([AaPp])\.\s?[Mm]\b\.?", r"\1m", text)
    for _ in range(5):  # as deep as such commands are nested
        text = TEXT.sub(lambda m: QUOTE + re.sub(f"[{QUOTE}{UNQUOTE}]", " ", m[1]) + UNQUOTE, text)
    return text


def _ascii(text: str) -> str:
    text = VULGAR.sub(
        lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text
    )
    text = RAISED.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = LOWERED.sub(lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}", text)
    text = unicodedata.normalize("NFKC", text.translate(SYMBOLS)).translate(SYMBOLS)
    return re.sub(r"[^\x00-\x7f]", lambda m: _letter(m[0]), text)


def _letter(character: str) -> str:
    """A digit of another script in ASCII, a Greek letter as its command, any other character as it is."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    name = unicodedata.name(character, "").split()
    if len(name) == 4 and name[0] == "GREEK" and name[2] == "LETTER":
        letter = "lambda" if name[3] == "LAMDA" else name[3].lower()
        return f"\\{letter.capitalize() if name[1] == 'CAPITAL' else letter} "
    return character


def _read(match: re.Match[str]) -> Iterator[Token]:
    """The tokens of one lexeme, as if no space stood before it."""
    lexeme = match[0]
    match match.lastgroup:
        case "number":
            yield Token("number", lexeme)
        case "letters":
            yield from _letters(lexeme)
        case "quoted":
            yield from _quoted(match["quoted"])
        case "environment":
            yield Token("command", re.sub(r"\s|(?<=\})\{.*", "", lexeme).replace("*", ""))
        case "blackboard":
            yield Token("command", rf"\mathbb{{{lexeme.strip(' {}')[-1]}}}")
        case "other":
            name = SPELLINGS.get(lexeme, lexeme)
            if name not in DROPPED:
                yield Token(_kind(name), name)


def _kind(name: str) -> Kind:
    if name.isalpha():
        return "word" if len(name) > 1 else "letter"
    return "command" if name.startswith("\\") else "mark"


def _letters(run: str) -> Iterator[Token]:
    """Letters outside \\text{}: the name of a command, a word, or variables side by side."""
    low = run.lower()
    if low in ("pi", "infinity", "inf") or run in COMMANDS:
        name = "\\infty" if low.startswith("inf") else "\\" + (run if run in COMMANDS else low)
        yield Token("command", SPELLINGS.get(name, name))
    elif len(run) == 4 and run[:3] in ("sin", "cos", "tan") and run not in ("cost", "sine", "sink", "tank"):
        yield from (Token("command", "\\" + run[:3]), Token("letter", run[3]))
    elif len(run) > 3 or low in SHORT_WORDS or NAME.fullmatch(run):
        yield Token("word", low)
    else:
        yield from (Token("letter", letter) for letter in run)


def _quoted(content: str) -> Iterator[Token]:
    for match in LEXEME.finditer(content):
        run = match["letters"]
        if run and run.lower() in ("infinity", "inf"):
            yield Token("command", r"\infty", True)
        elif run in COMMANDS - {"max", "min"} or (run and len(run) == 1):
            yield Token("letter" if len(run) == 1 else "command", run if len(run) == 1 else "\\" + run, True)
        elif run:
            yield Token("word", run.lower(), True)
        else:
            yield from (token._replace(spaced=True) for token in _read(match))
