"""The bundled word problems: right, apart, the same every time, and readable without a chat template."""

import logging
import re
import runpy
import sys
from itertools import islice
from pathlib import Path

import pytest

from oprd.evaluation.grade import extract_answer, grade
from oprd.evaluation.problems import EvalSettings, read_problems
from oprd.foundation.errors import UserError
from oprd.models.loading import load_model, load_tokenizer, resolve_model
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.rollouts.prompts import load_prompts
from oprd.rollouts.word_problems import task
from oprd.rollouts.word_problems.templates import HELD_OUT, HELD_OUT_CAST, TRAINING, TRAINING_CAST
from oprd.text import rendering
from oprd.text.rendering import Renderer

ROOT = Path(__file__).parents[3]
LINE = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def drawn(split, count=1500, seed=0):
    return list(islice(task.problems(split, seed), count))


@pytest.fixture(scope="module")
def by_split():
    return {split: drawn(split) for split in ("train", "test", "test-templates")}


def gives(left, sign, right, result):
    """Whether a calculation is right, without rounding."""
    left, right, result = int(left), int(right), int(result)
    if sign == "/":
        return right * result == left
    return result == {"+": left + right, "-": left - right, "*": left * right}[sign]


@pytest.mark.parametrize("split", ["train", "test", "test-templates"])
def test_worked_solutions_are_right_and_are_graded_so(by_split, split):
    for problem in by_split[split]:
        *lines, last = problem.solution.split("\n")
        steps = [LINE.fullmatch(line).groups() for line in lines]
        assert 1 <= len(steps) <= 3 and all(gives(*step) for step in steps)
        assert last == f"Answer: {steps[-1][-1]}" and 2 <= int(problem.answer) <= 144
        given = {*map(str, problem.numbers), *(step[-1] for step in steps)}
        assert all(number in given for step in steps for number in (step[0], step[2]))
        assert all(re.search(rf"\b{number}\b", problem.question) for number in problem.numbers)
    for problem in by_split[split][:60]:
        assert extract_answer(problem.solution) == problem.answer
        assert grade(problem.solution, problem.answer)
        assert not grade(problem.solution, str(int(problem.answer) + 1))


def test_every_template_is_used_and_every_number_of_it(by_split):
    assert len(TRAINING) >= 24 and len(HELD_OUT) >= 8 and not set(TRAINING) & set(HELD_OUT)
    assert {p.template for p in by_split["train"]} == {p.template for p in by_split["test"]} == set(TRAINING)
    assert {p.template for p in by_split["test-templates"]} == set(HELD_OUT)
    for template in (*TRAINING, *HELD_OUT):
        told = set(re.findall(r"{([abcd])}", template.story))
        assert told == set(re.findall(r"[abcd]", " ".join(template.steps)))
        assert template.story.endswith("?") and template.story.count("?") == 1


def test_questions_are_whole_sentences(by_split):
    for problems in by_split.values():
        for problem in problems:
            assert not re.search(r"[{}]|  ", problem.question)
    assert len({problem.question for problem in by_split["train"]}) == len(by_split["train"])


@pytest.mark.parametrize("split", ["test", "test-templates"])
def test_held_out_problems_share_no_name_thing_or_number_with_training(by_split, split):
    train = [*by_split["train"], *drawn("train", 500, seed=1)]
    held_out = [*by_split[split], *drawn(split, 500, seed=7)]
    assert not {p.numbers for p in train} & {p.numbers for p in held_out}
    for words, others in zip(TRAINING_CAST, HELD_OUT_CAST, strict=True):
        assert not set(words) & set(others)
        for own, problems in ((words, train), (others, held_out)):
            foreign = "|".join(set(words + others) - set(own))
            assert not any(re.search(rf"\b(?:{foreign})s?\b", p.question) for p in problems)


FIRST = "Jamal has 49 plums and Goran has 15 fewer. How many plums do they have together?"


def test_the_same_seed_gives_the_same_problems():
    assert drawn("test", 20) == drawn("test", 20) != drawn("test", 20, seed=1)
    assert drawn("test", 1)[0].question == FIRST  # on every machine


@pytest.mark.parametrize(
    ("split", "of"),
    [("train", "train"), ("test", "test"), ("eval", "test"), ("test-templates", "test-templates")],
)
def test_load_prompts(split, of):
    rows = load_prompts("word-problems", split)
    assert rows.column_names == ["prompt", "solution", "worked_solution"]
    assert rows.to_list() == task.rows(of)
    (message,) = rows[0]["prompt"]
    assert message["role"] == "user" and message["content"].endswith(task.INSTRUCTION)
    assert load_prompts("word-problems", split, answers=False).column_names == ["prompt"]


def test_other_splits_and_configurations_are_refused():
    with pytest.raises(UserError, match=r"has the splits train, test .* and test-templates, not 'dev'"):
        load_prompts("word-problems", "dev")
    with pytest.raises(UserError, match=r"only Hub datasets .* leave out config 'main'"):
        load_prompts("word-problems", config="main")


def test_a_base_model_reads_plain_text_in_training_and_evaluation_alike(caplog):
    rendering._tell_plain_text.cache_clear()
    name = resolve_model("tiny:student")
    model, tokenizer = load_model(name), load_tokenizer(name)
    tokenizer.chat_template = None
    rows = load_prompts("word-problems", "test").select(range(3))
    expected = [tokenizer(f"{row['prompt'][0]['content']}\n")["input_ids"] for row in rows]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert Renderer(tokenizer)(rows["prompt"]) == expected
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("the student's tokenizer has no chat template")
    problems = read_problems(model, tokenizer, rows, EvalSettings())
    assert [problem.prompt_ids for problem in problems] == expected


def test_one_bos_before_plain_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(["x"], vocab_size=270)
    tokenizer.chat_template, tokenizer.bos_token = None, tokenizer.eos_token
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    (ids,) = Renderer(tokenizer)([[{"role": "user", "content": "x"}]])
    assert ids.count(bos[1]) == 1 and tokenizer.decode(ids) == f"{bos[0]}x\n"


@pytest.mark.slow
def test_a_teacher_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(task, "NUM_TRAIN_PROBLEMS", 32)
    flags = {"model": "tiny:student", "steps": 3, "save_steps": 2, "batch_size": 4, "problems": 2}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    monkeypatch.setattr(sys, "argv", ["make_teacher.py", *words, "--output", str(tmp_path)])
    runpy.run_path(str(ROOT / "examples" / "make_teacher.py"), run_name="__main__")
    assert "of 2 held-out problems" in capsys.readouterr().out
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        assert load_model(str(folder)).config.num_hidden_layers == 4
        assert load_tokenizer(str(folder)).chat_template
    assert not (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
