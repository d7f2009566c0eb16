"""What do micro-batches under a budget of tokens save on rollouts of uneven length?

    python benchmarks/packing.py      # results/packing.csv

The update of one window of rollouts, lengths log-normal with σ = 0.8 as reasoning has them, in turn: `fixed`
pads micro-batches of four, in order of arrival, to their longest; `packed` allows each as many tokens as four
of the longest rollouts have (`max_tokens_per_micro_batch`). Loss and gradient are the same either way.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from arms import Shape, make_model
from harness import hardware, of_arm, paired_ratio, write
from torch import Tensor

from oprd.models.teacher import Teacher
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.packing import repack
from oprd.rollouts.rows import RolloutBatch, RolloutInputs, weigh_rows
from oprd.training.step import Update
from oprd.training.training_pair import TrainingPair

SHAPE = Shape(6, 256, 768, 4, 2, 4096, 2048, 2048)
ROLLOUTS, SIZE, PROMPT, MEDIAN = 32, 4, 64, 256


def make_window(seed: int) -> list[RolloutInputs]:
    """Rollouts with the weights of their rows, in micro-batches of `SIZE`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (MEDIAN * (0.8 * torch.randn(ROLLOUTS, generator=generator)).exp()).int().clamp(1, SHAPE.tokens)
    shape = ROLLOUTS, int(lengths.max())
    inputs: dict[str, Tensor] = {
        "prompt_ids": torch.randint(SHAPE.vocabulary, (ROLLOUTS, PROMPT), generator=generator),
        "prompt_mask": torch.ones(ROLLOUTS, PROMPT, dtype=torch.long),
        "completion_ids": torch.randint(SHAPE.vocabulary, shape, generator=generator),
        "completion_mask": (torch.arange(shape[1]) < lengths[:, None]).long(),
    }
    settings = ObjectiveSettings(positions="all")
    inputs |= weigh_rows(inputs, torch.zeros(ROLLOUTS, dtype=torch.bool), settings, lambda units: units)
    return [{k: v[i : i + SIZE] for k, v in inputs.items()} for i in range(0, ROLLOUTS, SIZE)]


def run(update: Update, parts: Sequence[RolloutInputs]) -> dict[str, float]:
    """Seconds, padded tokens and the gradient's norm of one window's update."""
    update.student.zero_grad()
    start, tokens = time.perf_counter(), 0
    for part in parts:
        batch = RolloutBatch.of(part)
        tokens += batch.student.input_ids.numel()
        update.loss(batch, step=0).backward()
    seconds = time.perf_counter() - start
    update.averages.pop(lambda values: values)
    update.stopwatch.pop()
    update.watch.check()
    squares = [p.grad.square().sum() for p in update.student.parameters() if p.grad is not None]
    return {"seconds": seconds, "tokens": tokens, "norm": float(torch.stack(squares).sum().sqrt())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "packing.csv")
    given = parser.parse_args()
    device = torch.device("cpu")
    student, teacher = (make_model(SHAPE, seed, device) for seed in (0, 1))
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    settings = ObjectiveSettings(positions="all")
    settings.check()
    pair = TrainingPair(student, None, Teacher(teacher), device)  # type: ignore[arg-type]
    update = Update.bind(settings, pair)
    update.freeze_unreached()
    rows = []
    for repeat in range(given.repeats + 1):
        window = make_window(repeat)
        longest = max(int(part["completion_mask"].sum(-1).max()) for part in window)
        packed = [part for parts in repack(window, SIZE * (PROMPT + longest)) for part in parts]
        for arm, parts in (("fixed", window), ("packed", packed)):
            row = {"arm": arm, "repeat": repeat, "micro_batches": len(parts)} | run(update, parts)
            rows += [row | hardware()] if repeat else []  # the first round warms up
            print(row, flush=True)
    write(given.output, rows)
    for key in ("seconds", "tokens", "norm"):
        fixed, packed = of_arm(rows, "fixed", key), of_arm(rows, "packed", key)
        ratio = "{:.3g} ({:.3g}–{:.3g})".format(*paired_ratio(fixed, packed))
        medians = [f"{statistics.median(values):.3g}" for values in (fixed, packed)]
        print(f"{key}: fixed {medians[0]}, packed {medians[1]}, ratio {ratio}")


if __name__ == "__main__":
    main()
