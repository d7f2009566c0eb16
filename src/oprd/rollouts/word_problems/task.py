"""The task `word-problems`: questions in English, worked solutions, and three splits that share nothing.

Names, things and numbers of held-out problems never occur in training: names and things are of another
cast, and a problem's numbers are held out if their digest falls into one of eight buckets, whatever seed
drew them. The split `test` tells the stories of training, `test-templates` others.
"""

import hashlib
import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypedDict

from oprd.foundation.errors import UserError
from oprd.rollouts.word_problems.templates import (
    HELD_OUT,
    HELD_OUT_CAST,
    TRAINING,
    TRAINING_CAST,
    Template,
)

NAME = "word-problems"
SPLITS = {"train": "train", "test": "test", "eval": "test", "test-templates": "test-templates"}
NUM_TRAIN_PROBLEMS = 4096
NUM_TEST_PROBLEMS = 256
HELD_OUT_BUCKETS = 8
STEPS_MIX = {1: 3, 2: 2, 3: 1}  # how often a problem takes so many steps
INSTRUCTION = 'Write one short calculation per line. End with a line "Answer: " and the number.'

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
SMALL, LARGE, LARGEST = 12, 60, 100  # factors and divisors; other numbers of a story; sums


class Row(TypedDict):
    """One problem in TRL's prompt format, with its answer and how it is worked out."""

    prompt: list[dict[str, str]]
    solution: str
    worked_solution: str


class Step(NamedTuple):
    """One calculation."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        """What it gives; exact where the step `is_easy`."""
        return OPERATIONS[self.sign](self.left, self.right)

    @property
    def is_easy(self) -> bool:
        """Whether it is within the times tables, or a sum to a hundred, or a difference, from 2 on."""
        if self.sign == "*":
            return max(self.left, self.right) <= SMALL
        if self.sign == "/":
            return self.left % self.right == 0 and 2 <= self.result <= SMALL and self.right <= SMALL
        return 2 <= self.result <= LARGEST

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.result}"


@dataclass(frozen=True)
class Problem:
    """A template with its numbers, and with the words of its story."""

    template: Template
    numbers: tuple[int, ...]
    words: tuple[tuple[str, str], ...]

    @property
    def question(self) -> str:
        """The story and what is asked."""
        return self.template.story.format(**dict(self.words), **dict(zip("abcd", self.numbers, strict=False)))

    @cached_property
    def steps(self) -> list[Step]:
        """The calculations that answer it, in order."""
        return worked(self.template, self.numbers)

    @property
    def answer(self) -> str:
        """The number that is asked for."""
        return str(self.steps[-1].result)

    @property
    def solution(self) -> str:
        """One calculation a line, then the answer."""
        return "\n".join([*map(str, self.steps), f"Answer: {self.answer}"])


def worked(template: Template, numbers: tuple[int, ...]) -> list[Step]:
    """The steps of a template with these numbers."""
    values, steps = dict(zip("abcd", numbers, strict=False)), []
    for result, text in zip("xyz", template.steps, strict=False):
        left, sign, right = text.split()
        steps.append(Step(values[left], sign, values[right]))
        values[result] = steps[-1].result
    return steps


def are_held_out(numbers: tuple[int, ...]) -> bool:
    """Whether a problem with these numbers belongs to the held-out eighth of all."""
    return hashlib.sha256(repr(numbers).encode()).digest()[0] % HELD_OUT_BUCKETS == 0


def problems(split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one split, no question twice; the same seed draws the same sequence."""
    generator = random.Random(f"{NAME}-{split}-{seed}")
    templates = HELD_OUT if split == "test-templates" else TRAINING
    by_steps = {count: [t for t in templates if len(t.steps) == count] for count in STEPS_MIX}
    seen: set[str] = set()
    while True:
        (count,) = generator.choices(list(STEPS_MIX), list(STEPS_MIX.values()))
        template = generator.choice(by_steps[count])
        numbers = _draw_numbers(generator, template, held_out=split != "train")
        problem = Problem(template, numbers, _draw_words(generator, held_out=split != "train"))
        if problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _draw_numbers(generator: random.Random, template: Template, held_out: bool) -> tuple[int, ...]:
    """Numbers that make every step easy, of one side of the split."""
    steps = " ; ".join(template.steps)
    names = sorted(set(re.findall(r"[abcd]", steps)))
    small = set(re.findall(r"([abcd]) \*|[*/] ([abcd])", steps))
    ranges = [SMALL if any(name in pair for pair in small) else LARGE for name in names]
    while True:
        numbers = tuple(generator.randint(2, most) for most in ranges)
        try:
            is_easy = all(step.is_easy for step in worked(template, numbers))
        except ZeroDivisionError:
            continue
        if is_easy and are_held_out(numbers) == held_out:
            return numbers


def _draw_words(generator: random.Random, held_out: bool) -> tuple[tuple[str, str], ...]:
    cast = HELD_OUT_CAST if held_out else TRAINING_CAST
    name, other = generator.sample(cast.names, 2)
    thing, bag = generator.choice(cast.things), generator.choice(cast.bags)
    words = {
        "name": name,
        "other": other,
        "thing": thing,
        "things": f"{thing}s",
        "bag": bag,
        "bags": f"{bag}s",
    }
    return tuple(words.items())


def rows(split: str, count: int | None = None, seed: int = 0) -> list[Row]:
    """The first `count` rows of a split; raises `UserError` for one that there is not."""
    if split not in SPLITS:
        raise UserError(
            f"{NAME} has the splits train, test (also called eval) and test-templates, not {split!r}: "
            "name one."
        )
    draw = problems(SPLITS[split], seed)
    count = count or (NUM_TRAIN_PROBLEMS if split == "train" else NUM_TEST_PROBLEMS)
    drawn = [next(draw) for _ in range(count)]
    return [
        Row(
            prompt=[{"role": "user", "content": f"{problem.question}\n{INSTRUCTION}"}],
            solution=problem.answer,
            worked_solution=problem.solution,
        )
        for problem in drawn
    ]
