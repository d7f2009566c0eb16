"""Classes of tokens that two vocabularies spell alike."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from oprd.text.shared_tokens import NO_CLASS, SharedTokens, Speller


def byte_level(*tokens, added=()):
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False
    )
    made.add_tokens(list(added), special_tokens=False)
    return made


def sentencepiece(*tokens):
    """▁ for a space, and bytes as tokens of their own."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False
    )


@pytest.fixture
def shared():
    """Student: a, b, Ġ, c, <end>. Teacher: <0x61> and a, ▁, d, b, <end>, <other end>."""
    student = Speller(byte_level("a", "b", "Ġ", "c"), [4], 6)  # one more logit than tokens
    teacher = sentencepiece("<0x61>", "a", "▁", "d", "b")
    teacher.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    return SharedTokens.of(student, Speller(teacher, [5, 6], 7))


def test_classes_are_texts_that_both_write_as_one_token(shared):
    assert shared.student.ids.tolist() == [0, 1, 2] and shared.teacher.ids.tolist() == [1, 4, 2]
    end = 3
    assert shared.student.classes.tolist() == [0, 1, 2, NO_CLASS, end, NO_CLASS]
    assert shared.teacher.classes.tolist() == [NO_CLASS, 0, 2, NO_CLASS, 1, end, end]


def test_a_softmax_over_classes_is_the_models_own_given_that_one_comes(shared):
    student, teacher = torch.randn(3, 6).double(), torch.randn(3, 7).double()
    ours, theirs = (logits.softmax(-1) for logits in shared.logits(student, teacher))
    p, q = student.softmax(-1)[:, [0, 1, 2, 4]], teacher.softmax(-1)
    torch.testing.assert_close(ours, p / p.sum(-1, keepdim=True))
    q = torch.stack([q[:, 1], q[:, 4], q[:, 2], q[:, 5] + q[:, 6]], -1)
    torch.testing.assert_close(theirs, q / q.sum(-1, keepdim=True))


def test_next_tokens_agree_where_one_class_comes(shared):
    student, teacher = torch.tensor([[0, 0, 1, 3, 4, 4]]), torch.tensor([[1, 0, 4, 3, 6, 1]])
    assert shared.next_tokens_agree(student, teacher).tolist() == [[True, False, True, False, True, False]]
