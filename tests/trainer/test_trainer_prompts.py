"""Prompts handed to the trainer: all are read by every template before a step, or refused by row."""

import copy

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from oprd.foundation.errors import UserError
from tiny_pair import prompt_texts

QUESTION = [{"role": "user", "content": "What is 3?"}]
PARTIAL = [*QUESTION, {"role": "assistant", "content": "3 plus "}]
SYSTEM = [{"role": "system", "content": "And then?"}, *QUESTION]
NO_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{- raise_exception('System role not supported') -}}{%- endif -%}"
    "{%- for message in messages -%}{{- message['role'] + ':' + message['content'] -}}"
    "{%- if not loop.last or add_generation_prompt -%}<|im_end|>{%- endif -%}{%- endfor -%}"
)


@pytest.fixture(scope="module")
def strict(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = NO_SYSTEM
    return strict


@pytest.fixture(scope="module")
def strict_teacher(teacher, strict, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(folder)
    strict.save_pretrained(folder)
    return str(folder)


def rows(*prompts):
    return Dataset.from_dict({"prompt": list(prompts)}, on_mixed_types="use_json")


@pytest.mark.parametrize("reader", ["student", "teacher"])
def test_a_row_that_a_template_refuses_is_named_before_the_first_rollout(
    make_trainer, strict, strict_teacher, reader
):
    config = {
        "student": {"extra": {"processing_class": strict}},
        "teacher": {"teacher": strict_teacher, "teacher_chat_template": "own"},
    }[reader]
    data = rows(*[QUESTION] * 6, SYSTEM)
    with pytest.raises(
        UserError, match=rf"^row 6 .*the {reader}'s chat template .*System role not supported"
    ):
        make_trainer(dataset=data, **config)
    trainer = make_trainer(dataset=data, drop_unrenderable_prompts=True, **config)
    assert len(trainer.train_dataset) == 6


def test_a_partial_turn_is_continued_by_student_and_teacher(
    make_trainer, tokenizer, strict_teacher, roll_out
):
    data = rows(*[PARTIAL, QUESTION] * 4)
    trainer = make_trainer(
        dataset=data, teacher=strict_teacher, teacher_chat_template="own", script=lambda ids: [10, 2]
    )
    batch = roll_out(trainer, 2)
    read = {
        name: [
            tokenizer.decode(ids[mask.bool()])
            for ids, mask in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
        ]
        for name in ("prompt", "teacher_prompt")
    }
    opened = "<|im_start|>user\nWhat is 3?<|im_end|>\n<|im_start|>assistant\n"
    assert read["prompt"] == [opened + "3 plus ", opened]
    assert read["teacher_prompt"] == [
        "user:What is 3?<|im_end|>assistant:3 plus ",
        "user:What is 3?<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rows(*[QUESTION] * 4, None), "row 4: the prompt is missing"),
        (
            rows(*[QUESTION] * 4, [{"role": "user", "content": None}]),
            "row 4: the content of message 0 is missing",
        ),
        (rows(*[QUESTION] * 4, "text"), "row 4: text and chat prompts are mixed"),
        (rows([{"role": "user", "content": [{"type": "image"}]}]), "row 0: .* a part of type 'image'"),
        (
            rows(QUESTION).add_column("image", ["a.png"]),
            "a column 'image', and oprd distils text-only models",
        ),
        ([{"prompt": QUESTION}], "train_dataset must be a datasets.Dataset, got list"),
    ],
)
def test_what_python_hands_over_is_checked(make_trainer, data, message):
    with pytest.raises(UserError, match=message):
        make_trainer(dataset=data)


def test_text_parts_are_read(make_trainer, tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 3?"}]}]
    trainer = make_trainer(dataset=rows(*[parts] * 4))
    (ids,), *_ = trainer._tokenize_prompts([trainer.train_dataset[0]["prompt"]])
    assert ids == tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]


def test_held_out_prompts_are_checked_too(make_trainer, strict):
    held_out = {"a": rows(QUESTION), "b": rows(QUESTION, SYSTEM)}
    extra = {"processing_class": strict, "eval_dataset": held_out}
    with pytest.raises(UserError, match=r"row 1 .*System role not supported"):
        make_trainer(extra=extra)
    trainer = make_trainer(extra=extra, drop_unrenderable_prompts=True)
    assert {name: len(data) for name, data in trainer.eval_dataset.items()} == {"a": 1, "b": 1}


def test_a_stream_trains_as_the_rows_it_begins_with(make_trainer):
    """Two steps of four prompts take eight, however many would come."""

    def endless():
        n = 0
        while True:
            yield {"prompt": prompt_texts(40)[n % 40], "id": n}
            n += 1

    stream = IterableDataset.from_generator(endless)
    trainer = make_trainer(dataset=stream, max_steps=2, script=lambda ids: [10, 2])
    assert trainer.train_dataset["prompt"][:] == prompt_texts(8)
    trainer.train()
    losses = [entry["loss/total"] for entry in trainer.state.log_history if "loss/total" in entry]
    same = make_trainer(dataset=rows(*prompt_texts(8)), max_steps=2, script=lambda ids: [10, 2])
    same.train()
    assert losses == [entry["loss/total"] for entry in same.state.log_history if "loss/total" in entry]
    assert len(losses) == 2
