"""Positions of models by their configs, and lengths of a run that fit into them or not."""

import pytest
from transformers import AutoConfig

from oprd.foundation.errors import UserError
from oprd.models.lengths import Reader, fitting_length
from oprd.models.positions import num_positions
from oprd.text.alignment import AlignedResponse

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
DEEPSEEK = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


def config(kind, **keys):
    return AutoConfig.for_model(kind, **keys)


@pytest.mark.parametrize(
    ("kind", "keys", "positions"),
    [
        ("qwen3", {"max_position_embeddings": 40960}, 40960),
        ("qwen2", {"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
        ("deepseek_v3", {"max_position_embeddings": 163840, "rope_parameters": DEEPSEEK}, 163840),
        ("llama", {"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, 131072),
        (
            "llama",
            {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            8192,
        ),
        (
            "llama",
            {"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            4096,
        ),
        ("phi3", {"max_position_embeddings": 131072, "rope_parameters": LONG}, 131072),
        # One kind of its layers is stretched, the other is not.
        (
            "gemma3_text",
            {"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            131072,
        ),
        ("gpt2", {"n_positions": 1024}, 1024),
        ("opt", {"max_position_embeddings": 2048}, 2048),  # its table has two rows more
        ("mpt", {"max_seq_len": 2048}, 2048),  # ALiBi from a table
        ("falcon", {"max_position_embeddings": 2048}, 2048),
        ("falcon", {"max_position_embeddings": 2048, "alibi": True}, None),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("rwkv", {"context_length": 1024}, None),
        ("recurrent_gemma", {}, None),
    ],
)
def test_num_positions(kind, keys, positions):
    assert num_positions(config(kind, **keys)) == positions


SMALL, LARGE = config("gpt2", n_positions=100), config("qwen3", max_position_embeddings=1000)


@pytest.mark.parametrize(
    ("readers", "length", "fits"),
    [
        ([], 5000, 5000),
        ([Reader("the student", config("mamba"), 40)], 5000, 5000),
        ([Reader("the student", SMALL, 40)], 60, 60),
        ([Reader("the student", SMALL, 40)], 61, 60),
        ([Reader("the student", LARGE, 40), Reader("the teacher", SMALL, 50)], 500, 50),
        # In its own tokens a response may be shorter; what is longer has no partner.
        ([Reader("the student", LARGE, 40), Reader("the teacher", SMALL, 50, False)], 500, 500),
    ],
)
def test_a_default_is_lowered_and_a_choice_refused(readers, length, fits):
    assert fitting_length(readers, length, is_default=True) == fits
    if fits == length:
        assert fitting_length(readers, length, is_default=False) == fits
    else:
        with pytest.raises(UserError, match=rf"max_completion_length is {length}, but .*lower it to {fits}"):
            fitting_length(readers, length, is_default=False)


def test_the_model_that_does_not_fit_is_named(caplog):
    caplog.set_level("INFO")
    readers = [Reader("the student", LARGE, 40), Reader("the teacher", SMALL, 50)]
    fitting_length(readers, 500, is_default=True)
    assert caplog.messages == [
        "max_completion_length is 50: the teacher has 100 positions, and the longest prompt takes 50 of them"
    ]


@pytest.mark.parametrize("are_its_own", [True, False])
def test_a_prompt_that_leaves_no_position_is_refused(are_its_own):
    readers = [Reader("the student", LARGE, 40), Reader("the teacher", SMALL, 100, are_its_own)]
    with pytest.raises(UserError, match="the teacher has 100 positions, and the longest prompt takes 100"):
        fitting_length(readers, 500, is_default=True)


def test_a_response_beyond_the_teachers_positions_is_paired_up_to_them():
    whole = AlignedResponse([5, 6, 7, 8], [(0, 0), (1, 2), (2, 3)], 4, False, ends_together=True)
    assert whole.within(4) is whole
    cut = whole.within(3)
    assert (cut.teacher_ids, cut.rows, cut.ends_together) == ([5, 6, 7], [(0, 0), (1, 2)], False)
    assert cut.coverage == 0.5
