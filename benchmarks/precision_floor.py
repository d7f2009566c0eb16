"""What is left of a loss when the student equals its teacher: the floor that rounding puts under a run.

    python benchmarks/precision_floor.py [--model tiny:teacher] [--dataset tiny] [--learning_rate 1e-3]

A model is its own teacher, in every precision that a run offers; the rollouts are its own. Printed as a
table, and written as CSV: the mean `relative_mse` over all layers and the exact KL before the first step and
after `--steps` of AdamW on the former. `like the student` is what a recipe gets that names no dtype.
bitsandbytes is left out where it is not installed. vLLM has no row: it draws the rollouts, and both models
read these.
"""

import argparse
import csv
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_bitsandbytes_available

from oprd.models.loading import load_model, load_tokenizer, resolve_model
from oprd.models.precision import Precision
from oprd.models.teacher import Teacher, quantization
from oprd.rollouts.generation import Sampling, generate, left_pad, render_prompt
from oprd.rollouts.prompts import load_prompts
from oprd.rollouts.rows import RolloutBatch, weigh_rows
from oprd.training.config import OPRDConfig
from oprd.training.step import Update
from oprd.training.training_pair import TrainingPair

CPU = torch.device("cpu")
COLUMNS = ("student", "teacher", "loss_first", "loss_last", "kl_first", "kl_last")


@dataclass(frozen=True)
class Student:
    """How a student computes: its weights' dtype, autocast's, and whether adapters alone are trained."""

    weights: torch.dtype
    autocast: torch.dtype | None = None
    adapters: bool = False


STUDENTS = {
    "float32": Student(torch.float32),
    "bf16": Student(torch.float32, torch.bfloat16),
    "fp16": Student(torch.float32, torch.float16),
    "bf16, bfloat16 weights": Student(torch.bfloat16, torch.bfloat16),
    "bf16, LoRA": Student(torch.float32, torch.bfloat16, adapters=True),
}
TEACHERS: dict[str, dict[str, Any]] = {
    "like the student": {},
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"quantization": "8bit"},
    "4bit": {"quantization": "4bit"},
}


def roll_out(name: str, dataset: str, count: int, length: int) -> dict[str, torch.Tensor]:
    """Rollouts of a model as a trainer hands them on."""
    model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
    prompts = [render_prompt(tokenizer, row["prompt"]) for row in load_prompts(dataset).select(range(count))]
    drawn = generate(model, tokenizer, prompts, Sampling(length, temperature=1.0, top_p=1.0), seed=0)
    ids, mask = left_pad(prompts, 0)
    written = [torch.tensor(rollout.response_ids) for rollout in drawn]
    return {
        "prompt_ids": ids,
        "prompt_mask": mask,
        "completion_ids": pad_sequence(written, batch_first=True),
        "completion_mask": pad_sequence([torch.ones_like(x) for x in written], batch_first=True),
    }


def measure(name: str, student: Student, teacher: dict[str, Any], inputs: Any, args: Any) -> list[float]:
    """`relative_mse` and exact KL, before the first step and after the last."""
    settings = OPRDConfig(
        output_dir="runs/precision-floor",
        bf16=student.autocast == torch.bfloat16,
        positions="all",
        representation_loss="relative_mse",
        output_loss="full_vocab",
        output_weight="1e-12",  # it is measured, and moves nothing
    )
    settings.fp16 = student.autocast == torch.float16  # which transformers grants an accelerator alone
    model, tokenizer = load_model(name, dtype=student.weights), load_tokenizer(name)
    precision = Precision.of(model, settings, DistributedType.NO)
    kwargs = dict(teacher)
    if kind := kwargs.pop("quantization", None):
        kwargs["quantization_config"] = quantization(kind)
    if student.adapters:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    pair = TrainingPair(model.train(), tokenizer, Teacher.load(name, kwargs, precision), CPU)
    update = Update.bind(settings, pair)
    update.freeze_unreached()
    whole = torch.zeros(len(inputs["prompt_ids"]), dtype=torch.bool)
    batch = RolloutBatch.of(inputs | weigh_rows(inputs, whole, settings, lambda units: units))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0)
    found = []
    for step in range(args.steps + 1):
        with torch.autocast("cpu", student.autocast) if student.autocast else nullcontext():
            loss = update.loss(batch, step)
        values = update.averages.pop(lambda x: x)
        found.append((values["loss/representation"], values["loss/output"]))
        if step < args.steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (first_loss, first_kl), (last_loss, last_kl) = found[0], found[-1]
    return [first_loss, last_loss, first_kl, last_kl]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny:teacher")
    parser.add_argument("--dataset", default="tiny")
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/precision-floor.csv"))
    args = parser.parse_args()
    name = resolve_model(args.model)
    inputs = roll_out(name, args.dataset, args.rollouts, args.length)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for student, how in STUDENTS.items():
            for teacher, kwargs in TEACHERS.items():
                if "quantization" in kwargs and not is_bitsandbytes_available():
                    continue
                numbers = [f"{x:.2g}" for x in measure(name, how, kwargs, inputs, args)]
                writer.writerow([student, teacher, *numbers])
                file.flush()
                print(f"{student:24} {teacher:18}", *(f"{number:>9}" for number in numbers), flush=True)


if __name__ == "__main__":
    main()
