"""Pairs of positions against a slow reading of the definition, for every kind of tokenizer; every refusal."""

import copy
import gc
import weakref
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from oprd.foundation.errors import UserError
from oprd.text.alignment import (
    AlignedResponse,
    Aligner,
    align_tokens,
    end_of_turn,
    row_pairs,
    same_vocabulary,
)

# The tokenizers, and what their ids spell as this file knows it

CORPUS = [
    "the answer is 12345 and then 67890, so the sum is 80235",
    "def answer(x):\n    return x + 1  # the answer\n\nfor i in range(100):\n        print(answer(i))",
    r"\frac{1}{2} \left( x^2 + y^2 \right) = \sqrt{42} \boxed{123} $\alpha \to \infty$",
    "你好，世界。答案是四十二。 こんにちは 안녕 العربية café Zürich 👩\u200d👩\u200d👧 🎉🎉 e\u0301 x̄ ﬁ",
] * 4
# A printable byte is its own character, the others are those from 256 on, in order.
LETTERS = {b: chr(b) for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255}
LETTERS |= {b: chr(256 + n) for n, b in enumerate(sorted(set(range(256)) - set(LETTERS)))}
BYTES = {letter: bytes([b]) for b, letter in LETTERS.items()}
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]
CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
)
ROLES = "{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}{%- endfor -%}"
INST = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- '[INST] ' + m['content'] + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m['content'] + eos_token -}}{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class Kit:
    """A tokenizer and, derived without it, the bytes of its ids, its control tokens and its ends."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    text: dict[int, bytes] = field(repr=False)
    controls: dict[int, bytes]
    ends: set[int]
    drops: tuple[bool, ...] = (False,)
    lossless: bool = field(default=True)

    def ids(self, *tokens: str) -> list[int]:
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[token] for token in tokens]

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def byte_level_spelling(token: str) -> bytes:
    return b"".join(BYTES[letter] for letter in token)


def metaspace_spelling(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if token in BYTE_TOKENS else token.replace("▁", " ").encode()


def kit(backend, spell, specials, ends, *, plain=(), eos, template=None, drops=(False,), unk=None) -> Kit:
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token=unk)
    fast.chat_template = template
    fast.add_special_tokens({"extra_special_tokens": list(specials)})
    fast.add_tokens([AddedToken(token, normalized=False) for token in plain])
    controls = {fast.convert_tokens_to_ids(name): name.encode() for name in {*specials, eos, unk} - {None}}
    text = {i: spell(t) for t, i in fast.get_vocab().items() if i not in controls and t not in plain}
    text |= {fast.convert_tokens_to_ids(name): name.encode() for name in plain}
    return Kit(fast, text, controls, {fast.convert_tokens_to_ids(name) for name in ends}, drops)


def byte_level(split: str, size: int, prefix: bool = False, **options) -> Kit:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
        if not prefix
        else [pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return kit(backend, byte_level_spelling, **options, drops=(False, True) if prefix else (False,))


@cache
def sentencepiece_bpe(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary, with byte tokens in front, and merges."""
    tokens, merges = ["<unk>", "<s>", "</s>", *BYTE_TOKENS], []
    words = [
        list(w) for line in CORPUS for w in ("▁" + line.replace(" ", "▁").replace("▁", " ▁")).split(" ") if w
    ]
    tokens += sorted({letter for word in words for letter in word} | {"▁"})
    while len(tokens) < size:
        pairs = [pair for word in words for pair in pairwise(word)]
        pair = max(sorted(set(pairs)), key=pairs.count)
        merges.append(pair)
        tokens.append("".join(pair))
        words = [merge(word, pair) for word in words]
    tokens = list(dict.fromkeys(tokens))
    return {token: index for index, token in enumerate(tokens)}, merges


def merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for letter in word:
        if merged and (merged[-1], letter) == pair:
            merged[-1] += letter
        else:
            merged.append(letter)
    return merged


def metaspace(backend: Tokenizer, drops: tuple[bool, ...], **options) -> Kit:
    return kit(backend, metaspace_spelling, specials=["<s>"], eos="</s>", unk="<unk>", drops=drops, **options)


def fallback_bpe(size: int) -> Tokenizer:
    vocabulary, merges = sentencepiece_bpe(size)
    return Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))


def llama_style(prefix: bool) -> Kit:
    backend = fallback_bpe(380)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    template = INST if prefix else None
    return metaspace(backend, (True, False) if prefix else (False,), ends=["</s>"], template=template)


def metaspace_bpe(scheme: str) -> Kit:
    backend = fallback_bpe(360)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    return metaspace(backend, (False,) if scheme == "never" else (True, False), ends=["</s>"])


def unigram() -> Kit:
    """Without byte tokens, so that what it does not know is lost."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    trained.decoder = decoders.Metaspace()
    made = metaspace(trained, (True, False), ends=["</s>"])
    return Kit(made.tokenizer, made.text, made.controls, made.ends, made.drops, lossless=False)


class ByteTokenizer(PreTrainedTokenizer):
    """Every byte is a token, and tokens are `bytes`, as in the tiktoken-based tokenizers on the Hub."""

    def __init__(self, **kwargs):
        super().__init__(eos_token="<eot>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict:
        return {bytes([b]): b for b in range(256)} | dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return [chr(b) for b in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> bytes:
        return bytes([index])


def raw_bytes() -> Kit:
    tokenizer = ByteTokenizer()
    end = tokenizer.eos_token_id
    return Kit(tokenizer, {b: bytes([b]) for b in range(256)}, {end: b"<eot>"}, {end})


DIGITS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
NUMBERS = r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+"
KITS = {
    "digits": byte_level(
        DIGITS,
        400,
        specials=["<|im_start|>", "<think>", "<|endoftext|>"],
        eos="<|im_end|>",
        ends=["<|im_end|>"],
        template=CHATML,
    ),
    "numbers": byte_level(
        NUMBERS,
        480,
        specials=["<|user|>", "<|assistant|>", "<|end|>", "<bos>", "<think>"],
        plain=["<tool>", "  \n"],
        eos="<|endoftext|>",
        ends=["<|end|>", "<|endoftext|>"],
        template=ROLES,
    ),
    "prefix": byte_level("", 300, prefix=True, specials=["<pad>"], eos="</s>", ends=["</s>"]),
    "llama": llama_style(prefix=True),
    "gemma": llama_style(prefix=False),
    "always": metaspace_bpe("always"),
    "first": metaspace_bpe("first"),
    "never": metaspace_bpe("never"),
    "unigram": unigram(),
    "bytes": raw_bytes(),
}
NAMES = sorted(KITS)
D, N, L, G, B = (KITS[name] for name in ("digits", "numbers", "llama", "gemma", "bytes"))


# The definition, slowly


def reference(student: Kit, student_ids: list[int], teacher: Kit, teacher_ids: list[int]):
    """Pairs under each treatment of a first space; the most win, then the decoders' own treatment."""
    own = student.drops[0], teacher.drops[0]
    found = {
        drops: reference_pairs(student, student_ids, teacher, teacher_ids, drops)
        for drops in product(student.drops, teacher.drops)
    }
    return found[max(found, key=lambda drops: (len(found[drops]), drops == own, -sum(drops)))]


def reference_pairs(student: Kit, student_ids: list[int], teacher: Kit, teacher_ids: list[int], drops):
    kits, ended, bodies = (student, teacher), [], []
    for side, ids in zip(kits, (student_ids, teacher_ids), strict=True):
        ended.append(bool(ids) and ids[-1] in side.ends)
        bodies.append(ids[:-1] if ended[-1] else ids)
    units = [spelled_units(*args) for args in zip(kits, bodies, drops, strict=True)]
    named = speaking(*units)
    spelled = []
    for mine, body, names in zip(units, bodies, named, strict=True):
        pieces = [b""] * len(body)
        for index, _, value in mine:
            pieces[index] += value if isinstance(value, bytes) else names.get(index, b"")
        spelled.append(pieces)
    ours, theirs = spelled
    limit = invalid_from(b"".join(ours), ended[0])
    pairs, after = [], 0
    for i in range(len(ours)):
        read = b"".join(ours[: i + 1])
        for j in range(after, len(theirs)):
            if len(read) <= limit and read == b"".join(theirs[: j + 1]):
                pairs.append((i, j))
                after = j + 1
                break
    if all(ended) and b"".join(ours) == b"".join(theirs) and limit >= len(b"".join(ours)):
        pairs.append((len(ours), len(theirs)))
    return pairs


def spelled_units(side: Kit, ids: list[int], drop: bool) -> list[tuple]:
    """(token, is a control token, one byte or the name), token by token and byte by byte."""
    units = []
    for index, token in enumerate(ids):
        if token in side.controls:
            units.append((index, True, side.controls[token].decode()))
        units += [(index, False, bytes([b])) for b in side.text.get(token, b"")]
    first = next((unit for unit in units if not unit[1]), None)
    if drop and first is not None and first[2] == b" ":
        units.remove(first)
    return units


def speaking(ours: list[tuple], theirs: list[tuple]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """The control tokens that spell their names, byte by byte and without any memory."""
    at, spoken = [0, 0], ({}, {})
    streams = ours, theirs

    def comes_next(side: int, name: str) -> bool:
        ahead = streams[side][at[side] :]
        run = [u[2] for u in ahead[: next((n for n, u in enumerate(ahead) if not u[1]), len(ahead))]]
        return name in run or b"".join(u[2] for u in ahead if not u[1]).startswith(name.encode())

    def next_is_control(side: int) -> bool:
        return at[side] < len(streams[side]) and streams[side][at[side]][1]

    while True:
        controls = [side for side in (0, 1) if next_is_control(side)]
        heads = [stream[at[side]] if at[side] < len(stream) else None for side, stream in enumerate(streams)]
        if len(controls) == 2:
            names = heads[0][2], heads[1][2]
            wanted = [comes_next(1, names[0]), comes_next(0, names[1])]
            for side in (0, 1):
                if names[0] == names[1]:
                    spoken[side][heads[side][0]] = names[side].encode()
                if names[0] == names[1] or all(wanted) or not wanted[side]:
                    at[side] += 1
        elif controls:
            (side,) = controls
            index, _, name = heads[side]
            at[side] += 1
            if comes_next(1 - side, name):
                spoken[side][index] = name.encode()
                left = len(name.encode())
                while left:
                    left -= not streams[1 - side][at[1 - side]][1]
                    at[1 - side] += 1
        elif None in heads or heads[0][2] != heads[1][2]:
            return spoken
        else:
            at = [at[0] + 1, at[1] + 1]


def invalid_from(data: bytes, ended: bool) -> int:
    """Where the first invalid UTF-8 starts; a character cut off by the end of a running response is not."""
    at = 0
    while at < len(data):
        lengths = [n for n in range(1, 5) if is_text(data[at : at + n])]
        if not lengths:
            rest = data[at:]
            completions = (bytes([0x80]), bytes([0x90]), bytes([0xBF]))
            tails = (b"".join(t) for n in (1, 2, 3) for t in product(completions, repeat=n))
            cut_off = len(rest) < 4 and any(
                is_text(rest + tail) and len((rest + tail).decode()) == 1 for tail in tails
            )
            return at if ended or not cut_off else len(data)
        at += lengths[0]
    return len(data)


def is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def longest_chain(ours: list[bytes], theirs: list[bytes]) -> int:
    """How many pairs of equal prefixes there can be: a longest common subsequence of prefixes."""
    table = np.zeros((len(ours) + 1, len(theirs) + 1), int)
    for i, j in product(range(len(ours)), range(len(theirs))):
        equal = b"".join(ours[: i + 1]) == b"".join(theirs[: j + 1])
        table[i + 1, j + 1] = max(table[i, j + 1], table[i + 1, j], table[i, j] + equal)
    return int(table[-1, -1])


def align(student: Kit, student_ids, teacher: Kit, teacher_ids):
    return align_tokens(student.tokenizer, student_ids, teacher.tokenizer, teacher_ids)


def fast(model, decoder=None, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


# Properties

SNIPPETS = st.sampled_from(
    [
        *(
            "x = 12345\n",
            "    return 1",
            r"\frac{1}{2}",
            "$x^2$",
            "the answer",
            "  two  spaces",
            "100000",
            "\t",
        ),
        *("👩\u200d👧", "e\u0301", "你好", "\ufffd", "�", "\x00\x7f", "\u2028", "é", "▁", "Ġ", "<0x41>"),
        *("<think>", "</s>", "<tool>", "  \n", "<|im_end|>", "<bos>"),
    ]
)
TEXTS = st.lists(SNIPPETS | st.text(max_size=6), max_size=5).map("".join)
PAIRS_OF_KITS = st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES))


def ids_of(side: Kit):
    """Ids that no encoder would give: any text tokens, single bytes, control tokens, ids without a token."""
    short = [i for i, piece in side.text.items() if len(piece) == 1]
    token = st.sampled_from(sorted(side.text)) | st.sampled_from(short)
    return st.lists(token | st.sampled_from([*side.controls, 10**6]), max_size=8)


@st.composite
def responses(draw):
    """Two kits, with texts under both tokenizers, torn up and fixed, or ids at random."""
    names = draw(PAIRS_OF_KITS)
    student, teacher = KITS[names[0]], KITS[names[1]]
    if draw(st.booleans()):
        text = draw(TEXTS)
        sides = [student.encode(text), teacher.encode(text)]
        for side, ids in zip((student, teacher), sides, strict=True):
            for _ in range(draw(st.integers(0, 2))):
                ids.insert(draw(st.integers(0, len(ids))), draw(st.sampled_from(sorted(side.controls))))
        if draw(st.booleans()):
            sides[1] = sides[1][: draw(st.integers(0, len(sides[1])))]
    elif draw(st.booleans()):
        sides = [draw(ids_of(student)), draw(ids_of(teacher))]
    else:
        ids = draw(ids_of(student))
        sides = [ids, Aligner(student.tokenizer, teacher.tokenizer).align(ids).teacher_ids]
    for side, ids in zip((student, teacher), sides, strict=True):
        ids += draw(st.sampled_from([[], sorted(side.ends)[:1], sorted(side.ends)[-1:]]))
    return names[0], sides[0], names[1], sides[1]


@settings(max_examples=500, deadline=None)
@given(responses())
def test_pairs_are_those_of_the_definition(case):
    first, student_ids, second, teacher_ids = case
    student, teacher = KITS[first], KITS[second]
    pairs = align(student, student_ids, teacher, teacher_ids)
    if student.text == teacher.text and student_ids == teacher_ids:
        assert pairs == [(i, i) for i in range(len(student_ids))]
        return
    assert pairs == reference(student, student_ids, teacher, teacher_ids)
    assert all(type(index) is int for pair in pairs for index in pair)
    assert all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(pairs))


@settings(max_examples=150, deadline=None)
@given(responses())
def test_swapping_the_sides_swaps_the_pairs(case):
    student, student_ids, teacher, teacher_ids = KITS[case[0]], case[1], KITS[case[2]], case[3]
    swapped = [(j, i) for i, j in align(teacher, teacher_ids, student, student_ids)]
    sides = (student, student_ids), (teacher, teacher_ids)
    texts = [b"".join(side.text.get(i, b"") for i in ids) for side, ids in sides]
    if all(invalid_from(text, ended=True) == len(text) for text in texts):
        assert swapped == align(student, student_ids, teacher, teacher_ids)


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    st.sampled_from(["digits", "numbers", "gemma", "never", "bytes"]),
    st.sampled_from(["digits", "gemma"]),
)
def test_there_are_as_many_pairs_as_there_can_be(data, first, second):
    """Where no token spells anything but its bytes, no set of equal prefixes is larger."""
    text = data.draw(TEXTS)
    ours, theirs = KITS[first].encode(text), KITS[second].encode(text)
    ours.insert(data.draw(st.integers(0, len(ours))), 10**6)
    theirs.insert(data.draw(st.integers(0, len(theirs))), 10**6)
    pieces = [
        [kit.text.get(i, b"") for i in ids] for kit, ids in ((KITS[first], ours), (KITS[second], theirs))
    ]
    controls = any(
        i in kit.controls for kit, ids in ((KITS[first], ours), (KITS[second], theirs)) for i in ids
    )
    if not controls and ours != theirs:
        assert len(align(KITS[first], ours, KITS[second], theirs)) == longest_chain(*pieces)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(NAMES))
def test_one_tokenizer_pairs_every_token_with_itself(data, name):
    side = KITS[name]
    ids = data.draw(ids_of(side))
    identity = [(i, i) for i in range(len(ids))]
    assert align(side, ids, side, ids) == identity
    aligned = Aligner(side.tokenizer, side.tokenizer).align(ids)
    assert aligned == AlignedResponse(ids, identity, len(ids), invalid_utf8=False, ends_together=True)
    assert aligned.coverage == (1.0 if ids else 0.0)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from([name for name in NAMES if name != "bytes"]))
def test_bytes_are_those_that_decode_gives(data, name):
    """Under a teacher whose tokens are bytes; a marker in front keeps decoders off the first space."""
    side = KITS[name]
    ids = [i for i in data.draw(ids_of(side)) if i not in side.controls and i in side.text]
    spelled = b"".join(side.text[i] for i in ids)
    if invalid_from(spelled, ended=True) < len(spelled):
        return
    marker = side.encode("x")[-1:]
    raw = side.tokenizer.decode(
        [*marker, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
    ).partition("x")[2]
    assert raw.encode() == spelled
    text = raw.removeprefix(" ") if side.drops[0] else raw
    aligned = Aligner(side.tokenizer, B.tokenizer).align(ids)
    assert bytes(aligned.teacher_ids) == text.encode() and not aligned.invalid_utf8


@settings(max_examples=150, deadline=None)
@given(TEXTS, PAIRS_OF_KITS, st.booleans())
def test_aligner_gives_the_teachers_own_tokens_and_their_rows(text, names, over):
    student, teacher = KITS[names[0]], KITS[names[1]]
    ids = student.encode(text) + sorted(student.ends)[:over]
    aligned = Aligner(student.tokenizer, teacher.tokenizer).align(ids)
    assert aligned.num_rows == len(ids) and aligned.coverage == len(aligned.rows) / max(1, len(ids))
    if student.text == teacher.text:
        assert (aligned.teacher_ids, aligned.rows) == (ids, [(t, t) for t in range(len(ids))])
        return
    assert not aligned.invalid_utf8
    if student.lossless:
        read = student.tokenizer.decode(ids, skip_special_tokens=True) if student is not B else text
        end = [end_of_turn(teacher.tokenizer)] * over
        assert aligned.teacher_ids == teacher.encode(read) + end
        pairs = align(student, ids, teacher, aligned.teacher_ids)
        assert aligned.rows == row_pairs(pairs, len(ids), len(aligned.teacher_ids))


# Examples


def test_digits_against_numbers():
    ours, theirs = D.ids("1", "2", "3", "4", "5"), N.ids("123", "45")
    assert align(D, ours, N, theirs) == [(2, 0), (4, 1)]
    assert align(D, D.encode("12345"), N, N.encode("12345")) == [(2, 0), (4, 1)]
    assert align(D, tuple(ours), N, torch.tensor(theirs)) == [(2, 0), (4, 1)]
    assert align(D, np.array(ours), N, theirs[:1]) == [(2, 0)]
    assert align(D, [], N, theirs) == align(D, ours, N, []) == align(D, [], N, []) == []


@pytest.mark.parametrize(
    ("pairs", "num_student", "num_teacher", "rows"),
    [
        ([(2, 0), (4, 1), (5, 2)], 6, 3, [(0, 0), (3, 1), (5, 2)]),
        ([(2, 0), (4, 1)], 5, 3, [(0, 0), (3, 1)]),
        ([(0, 0)], 1, 1, [(0, 0)]),
        ([], 3, 2, [(0, 0)]),
        ([], 0, 2, []),
        ([], 2, 0, []),
    ],
)
def test_rows_predict_the_token_after_the_pair(pairs, num_student, num_teacher, rows):
    assert row_pairs(pairs, num_student, num_teacher) == rows


def test_end_tokens_pair_with_each_other_in_last_place_only():
    one, two = D.encode("12"), N.encode("12")
    ours, theirs = D.ids("<|im_end|>"), N.ids("<|end|>")
    assert align(D, one + ours, N, two + theirs) == [(1, 0), (2, 1)]
    assert align(D, one + ours, N, two + N.ids("<|endoftext|>")) == [(1, 0), (2, 1)]  # its EOS ends too
    assert align(D, one + D.ids("<|endoftext|>"), N, two + theirs) == [(1, 0)]  # but here it is no end
    assert align(D, ours, N, theirs) == [(0, 0)]
    assert align(D, one + ours, N, two) == align(D, one, N, two + theirs) == [(1, 0)]
    assert align(D, one + ours, N, N.encode("13") + theirs) == [(0, 0)]
    assert align(D, one + ours, N, N.encode("1") + theirs) == [(0, 0)]
    assert align(D, one + ours, N, N.encode("12<|im_end|>")) == [(1, 0)]  # written out
    assert align(D, ours + one, N, theirs + two) == [(0, 0), (2, 1)]  # not last: both spell nothing
    assert align(D, one + ours + ours, N, two + theirs) == [(1, 0), (3, 1)]


def test_other_ends_are_named():
    """As a generation config lists them: special or not, they end a response in last place."""
    one, two, end = D.encode("12"), N.encode("12"), N.ids("<|end|>")
    assert set(D.ids("<|endoftext|>", "3")).isdisjoint(D.ends)
    for other in D.ids("<|endoftext|>"), D.ids("3"):
        args = D.tokenizer, one + other, N.tokenizer, two + end
        assert align_tokens(*args) == [(1, 0)]
        assert align_tokens(*args, student_ends=other) == [(1, 0), (2, 1)]
        assert align_tokens(*args, student_ends=torch.tensor([*other, *D.ids("<|im_end|>")])) == [
            (1, 0),
            (2, 1),
        ]
        args = N.tokenizer, two + end, D.tokenizer, one + other
        assert align_tokens(*args, teacher_ends=other) == [(0, 1), (1, 2)]
        aligned = Aligner(D.tokenizer, N.tokenizer, student_ends=other).align(one + other)
        assert aligned == AlignedResponse(two + end, [(0, 0), (2, 1)], 3, False, True)
        assert not Aligner(D.tokenizer, N.tokenizer).align(one + other).ends_together
    # The tokenizer's own ends stay ends, and one that is not last is none.
    assert Aligner(D.tokenizer, N.tokenizer, D.ids("3")).align(one + D.ids("<|im_end|>")).ends_together
    assert Aligner(D.tokenizer, N.tokenizer, D.ids("3")).align(D.ids("3") + one).teacher_ids == N.encode(
        "312"
    )


def test_one_vocabulary_pairs_its_ends_whatever_they_are():
    ids = D.ids("1", "2", "<|endoftext|>")
    chat = copy.deepcopy(D.tokenizer)
    assert same_vocabulary(D.tokenizer, chat)
    assert align_tokens(D.tokenizer, ids, chat, ids) == [(0, 0), (1, 1), (2, 2)]
    other = D.ids("1", "2", "<|im_end|>")
    assert align_tokens(D.tokenizer, ids, chat, other) == [(0, 0), (1, 1)]
    assert align_tokens(D.tokenizer, ids, chat, other, student_ends=ids[-1:]) == [(0, 0), (1, 1), (2, 2)]


def test_control_tokens_spell_their_name_where_the_other_side_does():
    think, text = D.ids("<think>"), D.encode("12")
    pieces = N.encode("<think>")
    assert len(pieces) > 1
    both = align(D, text + think + text, N, N.encode("12") + N.ids("<think>") + N.encode("12"))
    assert both == [(1, 0), (2, 1), (4, 2)]
    n = len(pieces)
    assert align(D, think + text, N, pieces + N.encode("12")) == [(0, n - 1), (2, n)]
    assert align(N, N.ids("<think>", "123"), D, D.encode("<think>123"))[-1][0] == 1
    assert align(D, text + think + text, N, N.encode("12") + N.encode("12")) == [(1, 0), (4, 1)]  # left out
    assert align(D, think + text, N, N.ids("<bos>", "<think>") + N.encode("12")) == [(0, 1), (2, 2)]
    assert align(D, think + text, N, N.ids("<bos>") + pieces + N.encode("12")) == [(0, n), (2, n + 1)]
    again = D.ids("<think>", "1", "<think>", "2")
    assert align(D, again, N, N.encode("<think>1<think>2"))[-1] == (3, len(N.encode("<think>1<think>2")) - 1)
    assert align(N, N.ids("<think>", "1", "<think>", "2"), B, list(b"<think>1<think>2"))[-1] == (3, 15)
    assert align(B, list(b"<think>1<think>2"), D, again) == [(6, 0), (7, 1), (14, 2), (15, 3)]
    # One that is over does not come again.
    repeated = D.ids("<think>", "<think>", "1"), N.ids("<think>", "<bos>", "1")
    assert align(D, repeated[0], N, repeated[1]) == [(0, 0), (1, 1), (2, 2)]
    # A name that goes on differently is not that name.
    assert align(D, think + text, N, N.encode("<thin") + N.encode("12")) == []
    # Names that come in another order spell nothing; what follows still pairs.
    assert align(D, D.ids("<think>", "<|endoftext|>", "1"), N, N.ids("<|endoftext|>", "<think>", "1")) == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]


def test_a_teachers_bos_takes_no_row_from_the_text():
    assert align(D, D.encode("12"), L, L.ids("<s>", "▁", "1", "2")) == [(0, 2), (1, 3)]
    assert align(L, L.ids("<s>", "▁", "1", "2"), D, D.encode("12")) == [(2, 0), (3, 1)]


def test_empty_pieces_pair_first_with_first():
    bos, pad = N.ids("<bos>")[0], 10**6
    assert align(D, [pad, *D.encode("12")], N, [bos, bos, *N.encode("12")]) == [(0, 0), (2, 2)]
    assert align(D, D.encode("12") + [pad] * 3, N, [*N.encode("12"), bos]) == [(1, 0), (2, 1)]
    assert align(D, [pad, -1], N, [bos]) == [(0, 0)]


def test_thousands_of_control_tokens():
    many = 5000
    ours, theirs = D.ids("<think>", "<|im_start|>") * many, N.ids("<think>", "<bos>") * many
    assert align(D, ours, N, theirs) == [(i, i) for i in range(2 * many)]
    assert align(D, ours, N, N.encode("12")) == []
    text = N.encode("<think>" * many)
    pairs = align(D, D.ids("<think>") * many, N, text)
    assert len(pairs) == many and pairs[-1] == (many - 1, len(text) - 1)
    aligned = Aligner(D.tokenizer, N.tokenizer).align(ours + D.encode("12"))
    assert (aligned.teacher_ids, aligned.rows) == (N.encode("12"), [(0, 0)])


def added_letter_kit() -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(D.tokenizer.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("Ġé▁", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def test_added_tokens_are_their_own_text():
    tokenizer = added_letter_kit()
    ids = tokenizer.encode("1Ġé▁2")
    assert len(ids) == 3
    assert align_tokens(tokenizer, ids, B.tokenizer, list("1Ġé▁2".encode())) == [(0, 0), (1, 7), (2, 8)]
    assert align(N, N.ids("<tool>", "123"), B, list(b"<tool>123")) == [(0, 5), (1, 8)]


@pytest.mark.parametrize("name", ["prefix", "llama", "always", "first", "unigram"])
@pytest.mark.parametrize("text", ["answer", "the answer", " the answer", "  the answer"])
def test_a_space_that_an_encoder_puts_first_is_not_text(name, text):
    side = KITS[name]
    ours, theirs = D.encode(text), side.encode(text)
    pairs = align(D, ours, side, theirs)
    assert pairs[-1] == (len(ours) - 1, len(theirs) - 1)
    assert [(j, i) for i, j in align(side, theirs, D, ours)] == pairs


@pytest.mark.parametrize("name", ["gemma", "never", "digits"])
def test_other_spaces_are_text(name):
    side = KITS[name]
    assert align(N, N.encode("answer"), side, side.encode(" answer")) == []


def test_nothing_pairs_beyond_a_difference():
    ours, theirs = D.encode("12e34"), N.encode("12ê34")
    assert align(D, ours, N, theirs) == [(1, 0)]  # "12" is one of the teacher's tokens


def test_pairs_go_on_behind_what_is_normalised():
    backend = Tokenizer.from_str(N.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    composing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    ours = D.ids("1", "2", "e", "Ì", "ģ", "3", "4")
    aligned = Aligner(D.tokenizer, composing).align(ours)
    assert composing.convert_ids_to_tokens(aligned.teacher_ids) == ["12", "Ã©", "3", "4"]
    # Read: nothing, 12, 12é, 12é3; é has been read with the last byte of its accent.
    assert aligned.rows == [(0, 0), (2, 1), (5, 2), (6, 3)]
    pairs = align_tokens(D.tokenizer, ours, composing, aligned.teacher_ids)
    assert pairs == [(1, 0), (4, 1), (5, 2), (6, 3)]


def test_a_byte_level_token_outside_the_alphabet_is_its_own_text():
    vocabulary = {letter: b for b, letter in LETTERS.items()} | {"a你": 256}
    tokenizer = fast(models.BPE(vocabulary, []), decoders.Sequence([decoders.ByteLevel()]), eos_token="</s>")
    assert align_tokens(tokenizer, [256, 0xC3, 0xA9], B.tokenizer, list("a你é".encode())) == [
        (0, 3),
        (1, 4),
        (2, 5),
    ]


def test_byte_tokens_are_bytes_only_to_a_decoder_that_knows_them():
    pieces = [("a", -1.0), ("<0x41>", -2.0)]
    literal = fast(models.Unigram(pieces), decoders.Metaspace(prepend_scheme="never"))
    both = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    a_byte = fast(models.Unigram(pieces), both)
    assert align_tokens(literal, [1, 0], B.tokenizer, list(b"<0x41>a")) == [(0, 5), (1, 6)]
    assert align_tokens(a_byte, [1, 0], B.tokenizer, list(b"Aa")) == [(0, 0), (1, 1)]


# Invalid UTF-8


def spelled(data: bytes) -> list[int]:
    return D.ids(*(LETTERS[b] for b in data))


def test_pairs_inside_a_character_are_fine():
    assert align(D, spelled("a你".encode()), B, list("a你".encode())) == [(n, n) for n in range(4)]
    assert align(D, spelled("你".encode()), G, G.ids("你")) == [(2, 0)]
    assert align(D, spelled("好".encode()), G, G.ids("<0xE5>", "<0xA5>", "<0xBD>")) == [
        (0, 0),
        (1, 1),
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("data", "valid"),
    [
        (b"ab\xffcd", 2),
        (b"\x80", 0),
        (b"a\xe4\xbdb", 1),
        (b"a\xc0\x80", 1),
        (b"\xed\xa0\x80", 0),  # half of a surrogate pair
        (b"a\xf5", 1),
    ],
)
def test_nothing_pairs_beyond_invalid_utf8(data, valid):
    assert align(D, spelled(data), B, list(data)) == [(n, n) for n in range(valid)]
    aligned = Aligner(D.tokenizer, B.tokenizer).align(spelled(data) + D.ids("<|im_end|>"))
    assert aligned.invalid_utf8 and bytes(aligned.teacher_ids) == data[:valid]
    assert aligned.rows == row_pairs([(n, n) for n in range(valid)], len(data) + 1, valid)


def test_a_cut_off_character_is_invalid_only_before_an_end():
    data = "a你".encode()[:-1]
    running, over = spelled(data), spelled(data) + D.ids("<|im_end|>")
    assert align(D, running, B, list(data)) == [(0, 0), (1, 1), (2, 2)]
    assert align(D, over, B, [*data, *B.ends]) == [(0, 0)]
    aligner = Aligner(D.tokenizer, B.tokenizer)
    assert aligner.align(running) == AlignedResponse(list(b"a"), [(0, 0)], 3, invalid_utf8=False)
    assert aligner.align(over) == AlignedResponse(list(b"a"), [(0, 0)], 4, invalid_utf8=True)


def test_a_literal_replacement_character_is_text():
    aligned = Aligner(D.tokenizer, N.tokenizer).align(D.encode("1\ufffd2"))
    assert N.tokenizer.decode(aligned.teacher_ids) == "1\ufffd2" and not aligned.invalid_utf8


# The aligner


def test_a_response_and_its_end():
    aligned = Aligner(D.tokenizer, N.tokenizer).align(D.ids("1", "2", "3", "4", "5", "<|im_end|>"))
    assert aligned == AlignedResponse(N.ids("123", "45", "<|end|>"), [(0, 0), (3, 1), (5, 2)], 6, False, True)
    assert aligned.coverage == 0.5
    back = Aligner(N.tokenizer, D.tokenizer)
    for end in "<|end|>", "<|endoftext|>":
        assert back.align(torch.tensor(N.ids("12", end))).teacher_ids == D.ids("1", "2", "<|im_end|>")
    assert back.align(N.ids("12", "<bos>")).teacher_ids == D.ids("1", "2")
    assert back.align(N.ids("<|end|>")) == AlignedResponse(D.ids("<|im_end|>"), [(0, 0)], 1, False, True)
    assert back.align([]) == AlignedResponse([], [], 0, False) and back.align([]).coverage == 0.0


def test_a_teacher_without_an_end():
    backend = Tokenizer.from_str(N.tokenizer.backend_tokenizer.to_str())
    endless = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert end_of_turn(endless) is None
    aligned = Aligner(D.tokenizer, endless).align(D.ids("1", "2", "<|im_end|>"))
    assert aligned == AlignedResponse(N.ids("12"), [(0, 0)], 3, False)


@pytest.mark.parametrize("before", [False, True])
def test_names_in_the_text_are_no_control_tokens(before):
    backend = Tokenizer.from_str(N.tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", N.ids("<bos>")[0])])
    backend.encode_special_tokens = before
    teacher = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    teacher.backend_tokenizer.encode_special_tokens = before
    for text in "a<|end|>b", "<bos>", "<think>1</think><|endoftext|>":
        aligned = Aligner(D.tokenizer, teacher).align(D.encode(text))
        assert not set(aligned.teacher_ids) & set(N.controls)
        assert teacher.decode(aligned.teacher_ids) == text
        assert aligned.rows[-1][0] >= len(D.encode(text)) - len(D.encode("t|>"))
        assert teacher.backend_tokenizer.encode_special_tokens == before
    assert "<bos>" in teacher.decode(teacher.encode("a"))  # which the alignment did not add


def test_the_students_control_tokens_are_no_text():
    ids = D.ids("1", "<think>", "2", "<|endoftext|>", "<|im_end|>", "3", "<|im_end|>")
    aligned = Aligner(D.tokenizer, B.tokenizer).align(ids)
    assert aligned.teacher_ids == [*b"123", *B.ends]
    assert aligned.rows == [(0, 0), (1, 1), (3, 2), (6, 3)]
    # Even before the same name as text, which `align_tokens` cannot know.
    ids = D.ids("<think>") + D.encode("<think>1")
    aligned = Aligner(D.tokenizer, B.tokenizer).align(ids)
    assert bytes(aligned.teacher_ids) == b"<think>1"
    assert (len(ids) - 1, 7) in aligned.rows


# Ends and vocabularies


def with_template(template: str | None, **tokens) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(N.tokenizer.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, "<|endoftext|>"),
        (ROLES, "<|end|>"),
        (INST, "<|endoftext|>"),
        ("{% for m in messages %}{{ m['content'] + '\n<think>' }}{% endfor %}<|end|>", "<think>"),
        ("{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}", "<|endoftext|>"),  # none after
        ("{% for m in messages %}{{ m['content'] + '<tool><|end|>' }}{% endfor %}", "<|end|>"),  # not special
        ("{{ messages[0]['content'] + '<|end|>' }}", "<|endoftext|>"),  # the reply is left out
        ("{{ raise_exception('system message first') }}", "<|endoftext|>"),
    ],
)
def test_end_of_turn(template, end):
    tokenizer = with_template(template, eos_token="<|endoftext|>")
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)


def test_end_of_turn_is_the_longest_name_that_fits():
    tokenizer = with_template(
        "{% for m in messages %}{{ m['content'] + '<|end|>>' }}{% endfor %}", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>", "<|end|>>", "<|end"]})
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>>")


def test_end_of_turn_follows_a_change_of_template():
    tokenizer = with_template(None, eos_token="<|endoftext|>")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    tokenizer.chat_template = ROLES
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")


def test_vocabularies_are_compared_without_added_tokens():
    renamed = Tokenizer.from_str(
        D.tokenizer.backend_tokenizer.to_str().replace("<|im_end|>", "<|eot_id|>").replace("<think>", "<t>")
    )
    variant = PreTrainedTokenizerFast(tokenizer_object=renamed, eos_token="<|eot_id|>")
    assert same_vocabulary(D.tokenizer, variant) and same_vocabulary(D.tokenizer, D.tokenizer)
    assert not same_vocabulary(D.tokenizer, N.tokenizer)
    ids = [*spelled(b"a\xff"), *D.ids("<|im_end|>"), 10**6]
    identity = [(n, n) for n in range(4)]
    assert align_tokens(D.tokenizer, ids, variant, ids) == identity
    assert Aligner(D.tokenizer, variant).align(ids) == AlignedResponse(ids, identity, 4, False, True)
    # Unequal ids go by their bytes.
    assert align_tokens(D.tokenizer, D.ids("1", "2"), variant, D.ids("1", "3")) == [(0, 0)]


def test_tables_follow_added_tokens_and_die_with_their_tokenizer():
    tokenizer = added_letter_kit()
    assert align_tokens(tokenizer, D.ids("1"), B.tokenizer, [ord("1")]) == [(0, 0)]
    tokenizer.add_tokens(["<new>"])
    assert align_tokens(tokenizer, tokenizer.encode("<new>"), B.tokenizer, list(b"<new>")) == [(0, 4)]
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


# Refusals

WORDS = {"a": 0, "##b": 1, "[UNK]": 2}
PIECES = [("a", -1.0), ("▁a", -2.0)]
SPACES = decoders.Replace("▁", " ")
UNREADABLE = {
    "wordpiece": fast(models.WordPiece(WORDS), decoders.WordPiece()),
    "wordpiece without a decoder": fast(models.WordPiece(WORDS)),
    "words": fast(models.WordLevel(WORDS, unk_token="[UNK]")),
    "unigram without a decoder": fast(models.Unigram(PIECES)),
    "ctc": fast(models.WordLevel(WORDS, unk_token="[UNK]"), decoders.CTC()),
    "end of word": fast(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), decoders.BPEDecoder()),
    "end of word in bytes": fast(
        models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"), decoders.ByteLevel()
    ),
    "parts of words in bytes": fast(
        models.BPE({"a": 0, "##b": 1}, [], continuing_subword_prefix="##"), decoders.ByteLevel()
    ),
    "a pattern": fast(models.Unigram(PIECES), decoders.Sequence([decoders.Replace(Regex("▁+"), " ")])),
    "strip in every token": fast(
        models.Unigram(PIECES), decoders.Sequence([SPACES, decoders.Strip(" ", 1, 0)])
    ),
    "strip at the end": fast(
        models.Unigram(PIECES), decoders.Sequence([SPACES, decoders.Fuse(), decoders.Strip(" ", 1, 1)])
    ),
    "replace in the whole": fast(models.Unigram(PIECES), decoders.Sequence([decoders.Fuse(), SPACES])),
    "bytes of the whole": fast(
        models.BPE({"a": 0}, []), decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
    ),
    "only fused": fast(models.Unigram(PIECES), decoders.Fuse()),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_tokenizers_without_bytes_are_refused_by_name(name):
    tokenizer = UNREADABLE[name]
    with pytest.raises(UserError, match="teacher's tokenizer 'TokenizersBackend'"):
        align_tokens(D.tokenizer, [1], tokenizer, [0])
    with pytest.raises(UserError, match="student's tokenizer 'TokenizersBackend'"):
        Aligner(tokenizer, D.tokenizer)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(UserError, match="teacher's tokenizer 'some/model'"):
        Aligner(D.tokenizer, tokenizer)
    tokenizer.name_or_path = ""
    assert align_tokens(tokenizer, [1, 0], tokenizer, [1, 0]) == [(0, 0), (1, 1)]
    assert Aligner(tokenizer, tokenizer).align([1, 0]).rows == [(0, 0), (1, 1)]
    with pytest.raises(UserError, match="student's tokenizer"):
        align_tokens(tokenizer, [1, 0], tokenizer, [0, 1])


def test_slow_tokenizers_need_tokens_of_bytes():
    class Letters(ByteTokenizer):
        def _convert_id_to_token(self, index: int) -> str:
            return chr(index)

    with pytest.raises(UserError, match="teacher's tokenizer 'Letters'"):
        Aligner(D.tokenizer, Letters())
