"""From the student's rollouts to what the teacher reads: tensors by hand, and what is refused or said."""

import copy

import pytest
import torch

from lookalikes import lookalike
from oprd.foundation.errors import UserError
from oprd.models.tiny.tokenizer import DIGITS, PAIRS, train_tokenizer
from oprd.rollouts.translation import Translation

CHAT = [[{"role": "user", "content": text}] for text in ("12+7", "a longer question")]
HINTED = "{{- hint | default('none') + ':' + messages[0]['content'] -}}"


@pytest.fixture(scope="module")
def ours():
    """Every digit is a token of its own."""
    return train_tokenizer(["12345+678=13023", "sum"] * 9, vocab_size=280, design=DIGITS)


@pytest.fixture(scope="module")
def theirs():
    """Digits go in pairs from the right."""
    texts = [f"{i:02d}{j:02d}+{i}" for i in range(10, 99, 4) for j in range(10, 99, 3)]
    return train_tokenizer([*texts, "12345+678=13023"] * 2, vocab_size=400, design=PAIRS)


def pad(rows, value=0):
    width = max(map(len, rows))
    ids = torch.tensor([row + [value] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Prompts


@pytest.mark.parametrize(
    ("template", "kwargs", "identity"),
    [("student", None, True), ("student", {}, True), ("own", None, False), ("student", {"hint": "x"}, False)],
)
@pytest.mark.parametrize("teacher", ["same", "none"])
def test_when_nothing_is_translated(ours, template, kwargs, identity, teacher):
    if (template, teacher) != ("own", "none"):
        translation = Translation(ours, ours if teacher == "same" else None, template, "own", kwargs)
        assert translation.is_identity is identity and translation.aligner is None


@pytest.mark.parametrize(
    ("template", "tokenization", "identity"),
    [
        ("student", "own", False),
        ("own", "own", False),
        ("own", "student", False),
        ("student", "student", True),
    ],
)
def test_another_vocabulary(ours, theirs, template, tokenization, identity):
    translation = Translation(ours, theirs, template, tokenization)
    assert translation.is_identity is identity
    assert (translation.aligner is not None) is (tokenization == "own")


@pytest.mark.parametrize("template", ["student", "own"])
def test_prompts_in_the_teachers_template_and_tokens(ours, theirs, template):
    """With another vocabulary the template is the teacher's in either case; padding is on the left."""
    read = Translation(ours, theirs, template).prompts(CHAT)
    first, second = (encode(theirs, f"<|user|>{chat[0]['content']}<|end|><|assistant|>") for chat in CHAT)
    missing = len(second) - len(first)
    assert missing > 0
    padded = [[theirs.pad_token_id] * missing + first, second]
    assert read["teacher_prompt_ids"].tolist() == padded
    assert read["teacher_prompt_mask"].tolist() == [[0] * missing + [1] * len(first), [1] * len(second)]
    assert list(read) == ["teacher_prompt_ids", "teacher_prompt_mask"]


def test_template_arguments(ours, theirs):
    hinted = train_tokenizer(["one: two"], vocab_size=270, design=PAIRS)
    hinted.chat_template = HINTED
    translation = Translation(ours, hinted, template_kwargs={"hint": "one"})
    for kwargs, start in (({}, "one"), ({"hint": "two"}, "two")):  # those of the call win
        ids = translation.prompts(CHAT[:1], **kwargs)["teacher_prompt_ids"].tolist()
        assert ids == [encode(hinted, f"{start}:12+7")]
    ids = Translation(ours, hinted).prompts(CHAT[:1])["teacher_prompt_ids"].tolist()
    assert ids == [encode(hinted, "none:12+7")]


def test_text_prompts_need_no_template(ours, theirs):
    bare = copy.deepcopy(theirs)
    bare.chat_template = None
    translation = Translation(ours, bare)
    ids = translation.prompts(["12+7"])["teacher_prompt_ids"].tolist()
    assert ids == [encode(theirs, "12+7")]
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
        translation.prompts([[{"role": "system", "content": "Add."}, *CHAT[0]]])


def test_own_needs_a_tokenizer(ours):
    with pytest.raises(UserError, match="teacher_chat_template: own needs a tokenizer"):
        Translation(ours, None, "own")


def test_a_tokenizer_without_padding_pads_with_zeros(ours):
    bare = train_tokenizer(["a"], vocab_size=270, design=PAIRS)
    bare.pad_token = None
    read = Translation(ours, bare).prompts(CHAT)
    assert read["teacher_prompt_ids"][0, 0] == 0 == read["teacher_prompt_mask"][0, 0]


# Responses


def test_responses_by_hand(ours, theirs):
    """12345+678 and EOS: the student's digits 1,2,3,4,5,+,6,7,8; the teacher's 1,23,45,+,6,78."""
    student = [encode(ours, text) for text in ("12345+678<|im_end|>", "45<|im_end|>", "123")]
    assert [len(row) for row in student] == [10, 3, 3]
    assert theirs.tokenize("12345+678") == ["1", "23", "45", "+", "6", "78"]
    tensors, aligned = Translation(ours, theirs).responses(*pad(student, ours.pad_token_id))
    end = theirs.eos_token_id
    wanted = [[*encode(theirs, "12345+678"), end], [*encode(theirs, "45"), end], encode(theirs, "123")]
    ids, mask = pad(wanted, theirs.pad_token_id)
    assert tensors["teacher_completion_ids"].tolist() == ids.tolist()
    assert tensors["teacher_completion_mask"].tolist() == mask.tolist()
    assert tensors["teacher_rows"].tolist() == [
        # read: nothing, 1, 12, 123, 1234, 12345, …+, …+6, …67, …678
        [0, 1, -1, 2, -1, 3, 4, 5, -1, 6],
        [0, -1, 1, *[-1] * 7],  # 45 is one token
        [0, 1, -1, *[-1] * 7],  # 1, 23: cut off, so no row has read all of it
    ]
    assert [response.num_rows for response in aligned] == [10, 3, 3]
    assert [response.coverage for response in aligned] == [0.7, 2 / 3, 2 / 3]


def test_a_response_that_ends_with_another_eos(ours, theirs):
    """A generation config may list several: the last row pairs, and the teacher ends with its own."""
    other = ours.pad_token_id
    assert other != ours.eos_token_id
    ids, mask = pad([[*encode(ours, "123"), other]])
    for ends, together in (([ours.eos_token_id, other], True), ([ours.eos_token_id], False)):
        tensors, (aligned,) = Translation(ours, theirs, student_ends=ends).responses(ids, mask)
        assert tensors["ends_together"].tolist() == [together] == [aligned.ends_together]
        wanted = [*encode(theirs, "123"), *[theirs.eos_token_id] * together]
        assert tensors["teacher_completion_ids"].tolist() == [wanted]
        assert tensors["teacher_rows"].tolist() == [[0, 1, -1, 2 if together else -1]]


def test_invalid_utf8(ours, theirs, caplog):
    """The teacher's tokens end before the first invalid byte, without an EOS; nothing after it is paired."""
    broken = ours.convert_tokens_to_ids("ÿ")
    late = [*encode(ours, "1+2"), broken, *encode(ours, "3<|im_end|>")]
    rows = [late, [broken, *encode(ours, "1<|im_end|>")]]
    tensors, aligned = Translation(ours, theirs).responses(*pad(rows))
    assert tensors["teacher_completion_ids"].tolist() == [encode(theirs, "1+2"), [theirs.pad_token_id] * 3]
    assert tensors["teacher_completion_mask"].tolist() == [[1, 1, 1], [0, 0, 0]]
    assert tensors["teacher_rows"].tolist() == [[0, 1, 2, -1, -1, -1], [-1] * 6]
    assert [response.invalid_utf8 for response in aligned] == [True, True]
    assert "only 33% of the student's rows are paired" in caplog.text


def test_one_vocabulary_has_nothing_to_translate(ours, theirs):
    ids, mask = pad([encode(ours, "12+7")])
    assert Translation(ours, ours, "own").responses(ids, mask) == ({}, [])
    assert Translation(ours, theirs, "own", "student").responses(ids, mask) == ({}, [])


# What is said of few pairs


def broken(tokenizer, before, after):
    """The ids of `before`, so many bytes that no UTF-8 holds, and an EOS."""
    invalid = [tokenizer.convert_tokens_to_ids("ÿ")] * after
    return [*encode(tokenizer, before), *invalid, tokenizer.eos_token_id]


def test_few_pairs_are_said_once(ours, theirs, caplog):
    translation = Translation(ours, theirs)
    translation.responses(*pad([broken(ours, "1+2", 2)]))  # rows 0, 1, 2 of 6: the text 1+2 has no fourth
    assert "only" not in caplog.text
    for _ in range(3):
        translation.responses(*pad([broken(ours, "1+2", 3), broken(ours, "1+2", 2)]))  # 6 of 13
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("only 46% of the student's rows are paired with the teacher's")


def test_pairing_that_stops_within_rollouts_is_said_once(ours, theirs, caplog):
    translation = Translation(ours, theirs)
    text = "12345+678=13023" * 8
    whole, late = [*encode(ours, text), ours.eos_token_id], broken(ours, text, 12)
    _, aligned = translation.responses(*pad([whole, late, whole, broken(ours, text, 8)]))
    assert [response.collapsed for response in aligned] == [False, False, False, False]
    assert not caplog.records
    for _ in range(2):
        _, aligned = translation.responses(*pad([whole, broken(ours, text, 20), whole, whole]))
        assert [response.collapsed for response in aligned] == [False, True, False, False]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "in 1 of 4 rollouts pairing stops well before the end; in the first of them 20 rows"
    )
    assert said.endswith("78=13023' and are unpaired: the student's next bytes are no valid UTF-8")


def test_what_the_teacher_reads_instead_is_said(ours, caplog):
    translation = Translation(ours, lookalike("gemma"))
    translation.responses(*pad([[*encode(ours, "1+2=3 ▁" + "45+6=51 " * 4), ours.eos_token_id]]))
    (said,) = [record.getMessage() for record in caplog.records if "pairing stops" in record.getMessage()]
    assert "after '1+2=3 '" in said and "the student writes '▁45+6" in said and "reads ' 45+6" in said


@pytest.mark.parametrize("texts", [["", "", "1"], ["", "1+2", ""]], ids=str)
def test_no_pairs_are_refused_unless_one_response_has_some(ours, theirs, texts):
    translation = Translation(ours, theirs)
    given = pad([broken(ours, text, 3) for text in texts])
    if "1+2" in texts:
        assert [len(a.rows) for a in translation.responses(*given)[1]] == [0, 3, 0]
    else:
        with pytest.raises(UserError, match=r"of 13 rows of 3 responses none but the first.*coverage 0"):
            translation.responses(*given)


def test_responses_of_one_token_are_no_reason_to_refuse(ours, theirs, caplog):
    tensors, _ = Translation(ours, theirs).responses(*pad([[ours.eos_token_id]] * 2))
    assert tensors["teacher_completion_ids"].tolist() == [[theirs.eos_token_id]] * 2
    assert tensors["teacher_rows"].tolist() == [[0], [0]]
    assert not caplog.records


def test_responses_beyond_the_teachers_positions_are_read_up_to_them(ours, theirs):
    """With room for 1, 23, 45 of 1, 23, 45, +, 6, 78, EOS."""
    student = [encode(ours, text) for text in ("12345+678<|im_end|>", "45<|im_end|>")]
    tensors, aligned = Translation(ours, theirs).responses(*pad(student, ours.pad_token_id), room=[3, 50])
    assert tensors["teacher_rows"].tolist() == [[0, 1, -1, 2, *[-1] * 6], [0, -1, 1, *[-1] * 7]]
    assert tensors["teacher_completion_mask"].sum(-1).tolist() == [3, 2]
    assert tensors["ends_together"].tolist() == [False, True]
    assert [response.coverage for response in aligned] == [0.3, 2 / 3]


def test_responses_of_nothing_that_can_be_read(ours, theirs):
    """Invalid UTF-8 from the first byte on: no token for the teacher, and still a batch."""
    (first,) = encode(ours, "é")[:1]
    ids, mask = pad([[first], [first]])
    read, aligned = Translation(ours, theirs, "own").responses(ids, mask)
    assert [response.teacher_ids for response in aligned] == [[], []]
    assert read["teacher_completion_ids"].shape == read["teacher_completion_mask"].shape == (2, 1)
    assert not read["teacher_completion_mask"].any()
