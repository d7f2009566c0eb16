"""Pairs behind what a tokenizer has normalised: those of the definition on normalised prefixes."""

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from lookalikes import byte_level, lookalike
from oprd.text.agreement import NOWHERE, agree
from oprd.text.alignment import Aligner, align_tokens
from oprd.text.spelling import encode, end_of_turn, spelling


def without_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text).lower()
    return "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


def one_space(text: str) -> str:
    text = unicodedata.normalize("NFKC", text)
    while "  " in text:
        text = text.replace("  ", " ")
    return text


# What the tokenizer does to a text, by other means than the tokenizer.
NORMALISED = {
    "qwen": lambda text: unicodedata.normalize("NFC", text),
    "nfkc": lambda text: unicodedata.normalize("NFKC", text),
    "nfd": lambda text: unicodedata.normalize("NFD", text),
    "uncased": without_accents,
    "quotes": lambda text: text.replace("``", '"').replace("''", '"'),
    "one space": one_space,
}
PIECES = [
    *("the answer ", "12345", " ", "  ", "\n", "\t", "    return x", "X = Y", "ABC", "''", "``", '"'),
    *("Ω", "\u2126", "é", "e\u0301", "q\u0307\u0323", "Å", "\u212b", "ﬁ", "x²", "ﷺ", "\u00a0", "İ", "ß"),
    *(
        "ẹ\u0301",
        "é\u0323",
        "가",
        "\u1100\u1161",
        "\u1112\u1161\u11ab",
        "ガ",
        "カ\u3099",
        "你好",
        "🎉",
        "👩\u200d👧",
    ),
    *("مرحبا", "שלום", "<tool>", "<tool>  x", " <end>", "<|im_end|>", "\ufffd"),
]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


def prefixes(tokenizer, ids):
    """What every prefix of `ids` spells, None inside a character."""
    pieces = spelling(tokenizer, "student").pieces(list(ids), ended=True)
    read = [b"".join(pieces[: n + 1]) for n in range(len(pieces))]
    texts = [text.decode(errors="replace") for text in read]
    return [text if text.encode() == data else None for text, data in zip(texts, read, strict=True)]


def longest_chain(ours, theirs):
    """How many prefixes can be paired in order: a longest common subsequence."""
    row = [0] * (len(theirs) + 1)
    for mine in ours:
        above, row = row, [0]
        for j, yours in enumerate(theirs):
            row.append(max(above[j + 1], row[j], above[j] + (mine is not None and mine == yours)))
    return row[-1]


@settings(max_examples=250, deadline=None)
@given(TEXTS, st.sampled_from(sorted(NORMALISED)), st.sampled_from(["gpt2", "gemma"]))
def test_pairs_are_those_of_normalised_prefixes(text, name, plain):
    """As many as there can be, up to the end, increasing, and the same from the other side."""
    student, teacher, normalise = lookalike(plain), lookalike(name), NORMALISED[name]
    ids = encode(student, text)
    assume(b"".join(spelling(student, "student").pieces(ids, ended=True)) == text.encode())
    aligned = Aligner(student, teacher).align([*ids, student.eos_token_id])
    *read, end = aligned.teacher_ids
    pairs = align_tokens(student, ids, teacher, read)
    assert [(j, i) for i, j in pairs] == align_tokens(teacher, read, student, ids)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))
    assert pairs[-1] == (len(ids) - 1, len(read) - 1)
    assert aligned.ends_together and aligned.stop is None and end == end_of_turn(teacher)
    ours, theirs = (
        [None if one is None else normalise(one) for one in prefixes(tokenizer, side)]
        for tokenizer, side in ((student, ids), (teacher, read))
    )
    whole = [(i, j) for i, j in pairs if ours[i] is not None and theirs[j] is not None]
    assert all(ours[i] == theirs[j] for i, j in whole)
    assert len(whole) == longest_chain(ours, theirs)


@pytest.mark.parametrize(
    ("name", "text", "other", "marks", "other_marks"),
    [
        ("qwen", "12", "12", [0, 1, 2], [0, 1, 2]),
        ("qwen", "1\u21262", "1Ω2", [0, 1, -1, -1, 2, 3], [0, 1, -1, 2, 3]),
        ("qwen", "e\u03011", "é1", [0, -1, -1, 1, 2], [0, -1, 1, 2]),
        ("nfkc", "ﬁ", "fi", [0, -1, -1, 1], [0, -1, 1]),
        ("nfkc", "aéΩ", "aéΩ", [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),  # the same: byte by byte
        ("uncased", "e\u0301X", "ex", [0, 1, -1, 1, 2], [0, 1, 2]),  # before and after what is dropped
        ("quotes", "a``b", 'a"b', [0, 1, -1, 2, 3], [0, 1, 2, 3]),
        ("one space", "a   b", "a b", [0, 1, 2, 2, 2, 3], [0, 1, 2, 3]),
        ("qwen", "1ab", "1xb", [0, 1, -1, -1], [0, 1, -1, -1]),  # no normaliser does that
        ("qwen", "1é", "1ê", [0, 1, 2, -1], [0, 1, 2, -1]),  # both have read the first byte
    ],
)
def test_marks(name, text, other, marks, other_marks):
    normalize = spelling(lookalike(name), "teacher").normalizer.normalize_str
    for one, two, wanted in ((text, other, (marks, other_marks)), (other, text, (other_marks, marks))):
        read = agree(one.encode(), two.encode(), normalize)
        assert [side.marks.tolist() for side in read] == list(wanted)
    if text != other:
        stop = agree(text.encode(), other.encode(), None)[0]
        assert stop.at < len(text.encode()) and (stop.marks[stop.at + 1 :] == NOWHERE).all()


def test_long_texts():
    """Differences far from each other, differences in a row, and long stretches without any."""
    nfc = normalizers.NFC().normalize_str
    for text in ("e\u0301" * 500, ("x" * 300 + "\u2126") * 20, "a" * 70_000 + "e\u0301" + "b" * 70_000):
        one, other = agree(text.encode(), nfc(text).encode(), nfc)
        assert (one.at, other.at) == (len(text.encode()), len(nfc(text).encode()))
        assert one.marks[-1] == other.marks[-1]
    spaces = normalizers.Replace(Regex(" {2,}"), " ").normalize_str
    text = ("a" + " " * 40 + "b\n") * 30
    one, other = agree(text.encode(), spaces(text).encode(), spaces)
    assert (one.at, other.at) == (len(text), len(spaces(text)))


def test_the_rest_of_a_rollout_is_not_lost():
    """A decomposed é, an Ohm sign and a Hangul syllable in three letters, then text."""
    student, teacher = lookalike("gpt2"), lookalike("qwen")
    for changed in ("e\u0301", "\u2126", "\u1112\u1161\u11ab"):
        text = f"the answer {changed} is 12345 and then 67890"
        ids = [*encode(student, text), student.eos_token_id]
        aligned = Aligner(student, teacher).align(ids)
        behind = [i for i, _ in aligned.rows if i > len(encode(student, f"the answer {changed}"))]
        assert len(behind) >= 5 and aligned.rows[-1][0] == len(ids) - 1
        assert aligned.ends_together and not aligned.collapsed


@pytest.mark.parametrize("text", ["<tool>  x", "a <end>b", "<tool>\n\n<end> c", "a  <x>  b"])
def test_spaces_that_an_added_token_takes_with_it(text):
    student, teacher = lookalike("gpt2"), lookalike("greedy")
    ids, read = encode(student, text), encode(teacher, text)
    assert (teacher.decode(read) == text) is ("<x>" in text)
    assert align_tokens(student, ids, teacher, read)[-1] == (len(ids) - 1, len(read) - 1)


def test_where_pairing_stops_is_told():
    student, teacher = lookalike("gpt2"), lookalike("gemma")
    tail = " and so on, to the end of the answer"
    aligned = Aligner(student, teacher).align(encode(student, "one ▁two" + tail))
    assert teacher.decode(aligned.teacher_ids) == "one  two" + tail  # as it does of a literal ▁
    stop = aligned.stop
    assert (stop.before, stop.student[:4], stop.teacher[:4]) == ("one ", "▁two", " two")
    assert 20 < stop.rows <= len(encode(student, "one ▁two" + tail)) - aligned.rows[-1][0]
    assert aligned.collapsed and not stop.invalid_utf8
    short = Aligner(student, teacher).align(encode(student, "one two ▁a"))
    assert short.stop.rows < 10 and not short.collapsed
    late = Aligner(student, teacher).align(encode(student, "12 " * 100 + "▁" + tail))
    assert 10 <= late.stop.rows < 0.1 * late.num_rows + 10
    assert late.collapsed is (late.stop.rows >= 0.1 * late.num_rows)


def test_teachers_with_two_normalisers_in_a_row():
    teacher = byte_level(normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), 320)
    text = "ABC ﬁ \u2126 x²"
    ids, read = encode(lookalike("gpt2"), text), encode(teacher, text)
    assert teacher.decode(read) == "abc fi ω x2"
    assert align_tokens(lookalike("gpt2"), ids, teacher, read)[-1] == (len(ids) - 1, len(read) - 1)


def test_stray_bytes_take_no_character_back():
    """A teacher whose vocabulary lacks a byte spells the rest of the character; what came before is read."""
    student, teacher = "\x81\U00040000".encode(), "\x81".encode() + b"\x80\x80\x80"
    for pair in ((student, teacher), (teacher, student)):
        one, other = agree(*pair, str)
        assert one.at == other.at == 2
        assert one.marks[:3].tolist() == other.marks[:3].tolist() == [0, 1, 2]
