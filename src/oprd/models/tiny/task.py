"""The bundled task: sums of four numbers, worked out in partial sums.

A problem is a tuple of four numbers in 1..99. Evaluation problems are those whose digest falls
into one of sixteen buckets, so training never sees one, whatever seed drew it.
"""

import hashlib
import random
from collections.abc import Iterator
from typing import Literal, TypedDict

Problem = tuple[int, int, int, int]
Split = Literal["train", "eval"]

EVAL_BUCKETS = 16
NUM_EVAL_PROBLEMS = 256
NUM_TRAIN_PROBLEMS = 8192


class Row(TypedDict):
    """One problem in TRL's prompt format."""

    prompt: list[dict[str, str]]
    solution: str


def is_eval_problem(problem: Problem) -> bool:
    """Whether `problem` belongs to the held-out sixteenth of all problems."""
    digest = hashlib.sha256(repr(problem).encode()).digest()
    return digest[0] % EVAL_BUCKETS == 0


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """Endless distinct problems of one split; the same seed draws the same sequence."""
    generator = random.Random(f"{split}-{seed}")
    seen: set[Problem] = set()
    while True:
        a, b, c, d = (generator.randint(1, 99) for _ in range(4))
        problem = (a, b, c, d)
        if problem not in seen and is_eval_problem(problem) == (split == "eval"):
            seen.add(problem)
            yield problem


def question(problem: Problem) -> list[dict[str, str]]:
    """The chat messages that pose `problem`."""
    return [{"role": "user", "content": f"Compute {'+'.join(map(str, problem))}."}]


def solution(problem: Problem) -> str:
    """The worked solution of `problem`: one partial sum a line, then the boxed answer."""
    total, lines = problem[0], []
    for number in problem[1:]:
        lines.append(f"{total}+{number}={total + number}")
        total += number
    return "\n".join([*lines, rf"The answer is \boxed{{{total}}}."])


def rows(split: Split, count: int | None = None, seed: int = 0) -> list[Row]:
    """The first `count` rows of a split: prompt messages and the reference answer."""
    count = count or (NUM_TRAIN_PROBLEMS if split == "train" else NUM_EVAL_PROBLEMS)
    draw = problems(split, seed)
    drawn = [next(draw) for _ in range(count)]
    return [Row(prompt=question(p), solution=str(sum(p))) for p in drawn]
