"""The bundled task, tokenizer and models, and their regeneration."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.grade import grade
from oprd.evaluation.problems import EvalSettings
from oprd.foundation.errors import UserError
from oprd.models.loading import TINY_MODELS, load_model, load_tokenizer, resolve_model
from oprd.models.tiny import task
from oprd.models.tiny.build import RUNS, TinySettings, build, greedy_accuracy
from oprd.rollouts.generation import Sampling
from oprd.rollouts.prompts import load_prompts
from oprd.text.alignment import same_vocabulary

MODELS = ("student", "teacher")


def test_training_and_evaluation_never_share_a_problem():
    train = set(itertools.islice(task.problems("train", seed=0), 4000))
    train |= set(itertools.islice(task.problems("train", seed=1), 4000))
    held_out = set(itertools.islice(task.problems("eval", seed=0), 1000))
    held_out |= set(itertools.islice(task.problems("eval", seed=7), 1000))
    assert not train & held_out


def test_problems_are_distinct_and_reproducible():
    first = list(itertools.islice(task.problems("eval", seed=0), 500))
    assert len(set(first)) == 500
    assert first == list(itertools.islice(task.problems("eval", seed=0), 500))


@pytest.mark.parametrize("problem", [(1, 2, 3, 4), (99, 99, 99, 99), (50, 1, 49, 100 - 1)])
def test_the_worked_solution_is_right(problem):
    text = task.solution(problem)
    assert grade(text, str(sum(problem))) and not grade(text, str(sum(problem) + 1))
    left_sides = [line.partition("=")[0] for line in text.splitlines()[:-1]]
    right_sides = [line.partition("=")[2] for line in text.splitlines()[:-1]]
    assert [str(eval(left)) for left in left_sides] == right_sides


@pytest.mark.parametrize("name", MODELS)
def test_bundled_tokenizer(name):
    tokenizer = load_tokenizer(f"tiny:{name}")
    text = tokenizer.apply_chat_template(
        task.question((1, 22, 3, 4)), add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nCompute 1+22+3+4.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for sample in ("12+7=19\n", "é漢字🙂", "  spaces\t"):
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample


@pytest.mark.parametrize("name", MODELS)
def test_bundled_checkpoints_are_small_bf16_folders_of_one_architecture(name):
    file = TINY_MODELS / name / "model.safetensors"
    assert file.stat().st_size < 4e6
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    shapes = [
        {k: v.shape for k, v in load_file(TINY_MODELS / n / "model.safetensors").items()} for n in MODELS
    ]
    assert shapes[0] == shapes[1]


def test_bundled_accuracies():
    tokenizer = load_tokenizer("tiny:student")
    student, teacher = (load_model(f"tiny:{n}", dtype="float32") for n in MODELS)
    assert 0.35 <= greedy_accuracy(student, tokenizer, 128) <= 0.65
    assert greedy_accuracy(teacher, tokenizer, 128) >= 0.97


def test_a_smaller_pair_is_rebuilt_the_same(tmp_path):
    settings = TinySettings(
        num_layers=2,
        width=32,
        steps=4,
        batch_size=4,
        student_accuracy=0.0,
        check_every=2,
        num_check_problems=4,
    )
    first, second = build(tmp_path / "a", settings), build(tmp_path / "b", settings)
    assert first == second and set(first) == set(MODELS)
    for name in MODELS:
        weights = [load_file(tmp_path / run / name / "model.safetensors") for run in "ab"]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    student, teacher = (load_file(tmp_path / "a" / n / "model.safetensors") for n in MODELS)
    assert any(not torch.equal(student[key], teacher[key]) for key in student)


def test_a_run_that_never_reaches_the_student_says_so(tmp_path):
    settings = TinySettings(
        num_layers=1, width=32, steps=2, batch_size=2, check_every=1, num_check_problems=2
    )
    with pytest.raises(RuntimeError, match="train longer"):
        build(tmp_path, settings)


def test_unknown_bundled_model():
    with pytest.raises(UserError, match="tiny:student, tiny:teacher"):
        resolve_model("tiny:nobody")


@pytest.mark.parametrize("name", ["bridge-teacher", "tokenizer-teacher"])
def test_other_teachers_are_small_deeper_wider_and_right(name):
    folder = TINY_MODELS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    model, tokenizer = load_model(str(folder), dtype="float32"), load_tokenizer(str(folder))
    assert model.config.num_hidden_layers > 4 and model.config.hidden_size > 128
    rows = load_prompts("tiny", "eval").select(range(128, 192))
    settings = EvalSettings(samples=2, sampling=Sampling(max_new_tokens=64), batch_size=128)
    assert evaluate(model, tokenizer, rows, settings, progress=False)["avg_at_k"] >= 0.97


def test_one_teacher_shares_the_students_tokenizer_and_the_other_does_not():
    names = ("student", "bridge-teacher", "tokenizer-teacher")
    student, same, other = (load_tokenizer(f"tiny:{name}") for name in names)
    assert same.get_vocab() == student.get_vocab() and same.chat_template == student.chat_template
    assert not same_vocabulary(student, other)
    assert student.tokenize("1+1234=1235") == ["1", "+", *"1234", "=", *"1235"]
    assert other.tokenize("1+1234=1235") == ["1", "+", "12", "34", "=", "12", "35"]
    chat = task.question((1, 22, 3, 4))
    text = other.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>Compute 1+22+3+4.<|end|><|assistant|>" and other.eos_token == "<|end|>"


def test_every_bundled_model_has_a_run():
    built = {name for settings in RUNS for name in (settings.student, settings.teacher) if name}
    assert built == {folder.name for folder in TINY_MODELS.iterdir()}
