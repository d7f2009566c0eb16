"""What lies between a student and a teacher of the same shape, on the student's own rollouts.

    python benchmarks/gap.py --student HuggingFaceTB/SmolLM2-135M-Instruct --teacher runs/laptop/teacher

It samples rollouts once and prints, as JSON too with --output:
layers      cosine of each layer's states; the share of Eq. 6's loss that it owns; the share of that which its
            eight largest dimensions own
profile     cosine of the first k and of the last k rows, averaged over layers (the paper's Fig. 8)
signal      of each objective: ‖E g‖ ÷ √(E ‖g − E g‖²), g the gradient of one micro-batch, both estimated
            without bias from all micro-batches (1: as much signal as noise)
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from oprd import capture, load_model, load_prompts, load_tokenizer
from oprd.models.teacher import Teacher
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.generation import Rollout, Sampling, generate, left_pad
from oprd.rollouts.rows import RolloutBatch, RolloutInputs, weigh_rows
from oprd.text.rendering import Renderer
from oprd.training.step import Update
from oprd.training.training_pair import TrainingPair

CPU = torch.device("cpu")
LARGEST = 8
OBJECTIVES: dict[str, dict[str, Any]] = {
    "relative_mse": {"representation_loss": "relative_mse"},
    "mse": {"representation_loss": "mse"},
    "sampled_token": {"representation_weight": "0", "output_loss": "sampled_token"},
    "top_16": {"representation_weight": "0", "output_loss": "top_k"},
}


def inputs_of(rollouts: Sequence[Rollout], pad: int) -> RolloutInputs:
    """Padded tensors of a micro-batch, as a trainer has them."""
    prompt, prompt_mask = left_pad([rollout.prompt_ids for rollout in rollouts], pad)
    responses = [torch.tensor(rollout.response_ids) for rollout in rollouts]
    return {
        "prompt_ids": prompt,
        "prompt_mask": prompt_mask,
        "completion_ids": pad_sequence(responses, batch_first=True, padding_value=pad),
        "completion_mask": pad_sequence([torch.ones_like(r) for r in responses], batch_first=True),
    }


def states(models: Sequence[Any], inputs: RolloutInputs) -> list[dict[int, Tensor]]:
    """By layer, the rows of all responses, rollout by rollout, of every model."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    rows = torch.zeros_like(mask, dtype=torch.bool)
    width = inputs["completion_mask"].shape[1]
    rows[:, -width - 1 : -1] = inputs["completion_mask"].bool()
    found = []
    for model in models:
        layers = range(1, model.config.num_hidden_layers + 1)
        with torch.no_grad(), capture(model, layers, rows) as captured:
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        found.append(captured)
    return found


def layers(student: dict[int, Tensor], teacher: dict[int, Tensor]) -> dict[int, dict[str, float]]:
    """Cosine, share of the loss, and the largest dimensions' share of it."""
    gaps = {layer: (student[layer] - teacher[layer]).square().mean(0) for layer in student}
    whole = sum(float(gap.mean()) for gap in gaps.values())
    return {
        layer: {
            "cosine": float(torch.cosine_similarity(student[layer], teacher[layer], dim=-1).mean()),
            "share_of_loss": float(gap.mean()) / whole,
            "share_of_largest_dimensions": float(gap.topk(LARGEST).values.sum() / gap.sum()),
        }
        for layer, gap in gaps.items()
    }


def profile(
    student: dict[int, Tensor], teacher: dict[int, Tensor], lengths: Sequence[int]
) -> list[dict[str, float]]:
    """Cosine of the first and of the last k rows of every rollout, for k = 1, 2, 4, …"""
    by_row = torch.stack([torch.cosine_similarity(student[n], teacher[n], dim=-1) for n in student]).mean(0)
    rollouts = by_row.split(list(lengths))
    return [
        {
            "k": k,
            "first": float(torch.cat([rows[:k] for rows in rollouts]).mean()),
            "last": float(torch.cat([rows[-k:] for rows in rollouts]).mean()),
        }
        for k in (2**power for power in range(int(math.log2(max(lengths))) + 1))
    ]


def gradients(update: Update, batches: Sequence[RolloutBatch]) -> Iterator[Tensor]:
    """The gradient of each micro-batch, as one vector."""
    parameters = [p for p in update.student.parameters() if p.requires_grad]
    for batch in batches:
        update.loss(batch, step=0).backward()
        yield torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        update.student.zero_grad()


def signal(gradients: Iterable[Tensor]) -> float:
    """‖E g‖ ÷ √(E ‖g − E g‖²); 0 where what is measured of the mean is less than its own error."""
    count, total, squares = 0, torch.zeros(()), 0.0
    for gradient in gradients:
        count += 1
        total = total + gradient
        squares += float(gradient.double().square().sum())
    mean = float((total / count).double().square().sum())
    noise = (squares - count * mean) / (count - 1)
    return math.sqrt(max(mean - noise / count, 0) / noise)


def measure(student_name: str, teacher_name: str, rollouts: int, batch: int, tokens: int) -> dict[str, Any]:
    """All of it, on rollouts of the first training problems."""
    student, teacher = (load_model(name, dtype="float32").eval() for name in (student_name, teacher_name))
    tokenizer = load_tokenizer(student_name)
    prompts = Renderer(tokenizer)(load_prompts("word-problems", "train")[:rollouts]["prompt"])
    sampling = Sampling(max_new_tokens=tokens, temperature=1.0, top_p=1.0)
    drawn: list[Rollout] = []
    for start in range(0, rollouts, 16):
        drawn += generate(student, tokenizer, prompts[start : start + 16], sampling, seed=start)
    pad = tokenizer.pad_token_id or 0
    batches = [inputs_of(drawn[start : start + batch], pad) for start in range(0, rollouts, batch)]
    ours, theirs = (
        {layer: torch.cat([each[layer] for each in side]) for layer in side[0]}
        for side in zip(*(states((student, teacher), inputs) for inputs in batches), strict=True)
    )
    found: dict[str, Any] = {
        "student": student_name,
        "teacher": teacher_name,
        "rollouts": rollouts,
        "layers": layers(ours, theirs),
        "profile": profile(ours, theirs, [len(rollout.response_ids) for rollout in drawn]),
        "signal": {},
    }
    for name, keys in OBJECTIVES.items():
        settings = ObjectiveSettings(layers="all", positions="all", **keys)
        settings.check()
        pair = TrainingPair(student, tokenizer, Teacher(teacher), CPU)
        update = Update.bind(settings, pair)
        weighed = [
            RolloutBatch.of(inputs | weigh_rows(inputs, torch.zeros(batch) > 0, settings, lambda n: n))
            for inputs in batches
        ]
        found["signal"][name] = signal(gradients(update, weighed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4, help="rollouts per micro-batch")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = measure(given.student, given.teacher, given.rollouts, given.batch, given.tokens)
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=1) + "\n")
    print("| layer | cosine | share of the loss | of that, the 8 largest dimensions |\n|---|---|---|---|")
    for layer, row in found["layers"].items():
        print(
            f"| {layer} | {row['cosine']:.4f} | " + " | ".join(f"{row[k]:.1%}" for k in list(row)[1:]) + " |"
        )
    print("\n| k | first k rows | last k rows |\n|---|---|---|")
    for row in found["profile"]:
        print(f"| {row['k']} | {row['first']:.4f} | {row['last']:.4f} |")
    print("\n| objective | signal to noise |\n|---|---|")
    for name, ratio in found["signal"].items():
        print(f"| {name} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
