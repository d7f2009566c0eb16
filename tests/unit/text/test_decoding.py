"""What added tokens and byte tokens spell: what the tokenizer's own decoder gives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from lookalikes import DECODING, FIRST_SPACE, KINDS, LLAMA, byte_level, exact, lookalike, sentencepiece
from oprd.text.alignment import Aligner, align_tokens
from oprd.text.spelling import encode, spelling


def spelled(name, *tokens, ended=True):
    tokenizer = lookalike(name)
    return spelling(tokenizer, "student").pieces(tokenizer.convert_tokens_to_ids(list(tokens)), ended)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(sorted(KINDS)))
def test_ids_spell_what_decode_gives(data, name):
    """Whatever the ids, where decode has text for them all; a word in front keeps it off the first space."""
    tokenizer = lookalike(name)
    known = spelling(tokenizer, "student")
    added = [i for i in tokenizer.added_tokens_decoder if i in known.text]
    token = st.sampled_from(sorted(known.text))
    ids = data.draw(st.lists(st.one_of(token, st.sampled_from(added)) if added else token, max_size=8))
    ids = [*encode(tokenizer, "x"), *ids]
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" not in decoded:
        text = b"".join(known.pieces(ids, ended=True)).decode()
        assert text.removeprefix(" " * known.drops_space[0]) == decoded


@pytest.mark.parametrize(
    ("name", "token", "text"),
    [
        ("gemma", "▁▁▁", "   "),
        ("gemma", "\n\n", "\n\n"),
        ("gemma", "\t\t", "\t\t"),
        ("gemma", "<table>", "<table>"),
        ("gemma, normalised", "▁▁", "  "),
        ("gemma, normalised", "the▁end", "the end"),
        ("special bytes", "<0x41>", "A"),
        ("phi", "   ", "   "),
        ("words", "世界", "世界"),
        ("words", "cafÃ©", "café"),  # stored as a byte-level BPE stores its words
        ("words", "ä½łå¥½", "你好"),
        ("words", "café", "café"),  # stored as it is written: decode gives caf\ufffd
        ("words", "é", "é"),
        ("deepseek", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁begin｜>"),
    ],
)
def test_added_tokens(name, token, text):
    tokenizer = lookalike(name)
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or tokenizer.convert_ids_to_tokens(index) != token:
        index = next(i for i in tokenizer.added_tokens_decoder if tokenizer.convert_ids_to_tokens(i) == token)
    assert spelling(tokenizer, "student").pieces([index], ended=True) == [text.encode()]


def test_a_letter_that_was_added_is_still_a_byte_of_other_characters():
    """`é` has the id of byte E9 then, with which 鷗 begins as well."""
    assert b"".join(spelled("words", "é", "·", "Ĺ", "é", "x")) == "鷗éx".encode()
    assert spelled("words", "Ã", "©", "Ã", "x") == [b"\xc3", b"\xa9", "Ã".encode(), b"x"]
    assert spelled("words", "x", "é", ended=False) == [b"x", b"\xe9"]  # cut off: more may come
    assert spelled("words", "x", "café", ended=False) == [b"x", "café".encode()]
    assert spelled("words", "å", "é", "é") == [b"\xe5", b"\xe9", b"\xe9"]  # invalid before it


@pytest.mark.parametrize(
    "text", ["un café noir, naïve 鷗", "日本 и 😀", "a  b\n\n\tc <table>", "<0xE6> <think>"]
)
@pytest.mark.parametrize("student", KINDS)
def test_every_token_of_one_text_is_read_by_the_other(student, text):
    ours, plain = lookalike(student), lookalike("gpt2")
    for one, other in ((ours, plain), (plain, ours)):
        ids, read = encode(one, text), encode(other, text)
        assert align_tokens(one, ids, other, read)[-1] == (len(ids) - 1, len(read) - 1)


@pytest.mark.parametrize("kind", ["prepended", "metaspace", "prefix"])
@pytest.mark.parametrize("text", ["the<x>12 the", "<x> the", "a<x>  12\n<x>\n <x><x> end"])
def test_a_space_that_an_encoder_puts_behind_an_added_token_is_not_text(kind, text):
    """Such a token cuts a text in two, and both parts get the space."""
    if kind == "prefix":
        tokenizer = byte_level(size=380, added=["<x>"])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "metaspace":
        tokenizer = sentencepiece(None, [decoders.ByteFallback(), decoders.Metaspace()], ["<x>"])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer = sentencepiece(LLAMA, [*DECODING, FIRST_SPACE], [exact("<x>")])
    plain = lookalike("gpt2")
    if text == "the<x>12 the":
        assert "<x> 12" in tokenizer.decode(encode(tokenizer, text))
    for student, teacher in ((plain, tokenizer), (tokenizer, plain)):
        aligned = Aligner(student, teacher).align([*encode(student, text), student.eos_token_id])
        assert aligned.ends_together and aligned.stop is None


def test_bytes_that_are_special_reach_the_teacher():
    student, teacher = lookalike("special bytes"), lookalike("gpt2")
    ids = student.convert_tokens_to_ids(["<0xE6>", "<0x97>", "<0xA5>", "1"])
    aligned = Aligner(student, teacher).align(ids)
    assert teacher.decode(aligned.teacher_ids) == "日1"
    assert aligned.rows[-1] == (3, len(aligned.teacher_ids) - 1)


def test_a_special_token_with_a_name_is_no_text():
    student = byte_level(size=300, specials=["<|endoftext|>", exact("<mask>", lstrip=True)])
    ids = student("a <mask>b")["input_ids"]
    assert student.convert_ids_to_tokens(ids) == ["a", "<mask>", "b"]
    assert spelling(student, "student").pieces(ids, ended=False) == [b"a", b"", b"b"]
