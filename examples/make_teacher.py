"""Make a teacher of word problems: a model trained further on worked solutions, by TRL's SFTTrainer.

python examples/make_teacher.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/teacher

The teacher lies at the root of the folder. Its checkpoints are models too: students of the same origin, the
weaker the earlier.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from oprd import load_model, load_prompts, load_tokenizer
from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.problems import EvalSettings
from oprd.rollouts.generation import Sampling
from oprd.text.rendering import plain_text

WARM_UP = 10  # steps


class Budget(TrainerCallback):
    """So many minutes or, where they are given, so many steps: the learning rate goes to zero over them."""

    def __init__(self, minutes: float, steps: int | None) -> None:
        self.seconds, self.steps, self.start = 60 * minutes, steps, time.monotonic()

    def spent(self, step: int) -> float:
        """The share that is gone after a step."""
        return step / self.steps if self.steps else (time.monotonic() - self.start) / self.seconds

    def rate(self, step: int) -> float:
        """The share of the learning rate."""
        return min(1, (step + 1) / WARM_UP) * max(0, 1 - self.spent(step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the training when the budget is spent."""
        control.should_training_stop |= self.spent(state.global_step) >= 1


def own_solutions() -> Dataset:
    """The bundled training problems with their worked solutions."""
    rows = load_prompts("word-problems", "train")
    return rows.select_columns(["prompt", "worked_solution"])


def sampled_solutions(file: str) -> Dataset:
    """Problems with a model's answers, right or wrong, from the samples.jsonl of `oprd eval`.

    Answers that were cut have no end and are left out.
    """
    records = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return Dataset.from_list(
        [
            {"prompt": record["prompt"], "worked_solution": sample["text"]}
            for record in records
            for sample in record["samples"]
            if not sample["truncated"]
        ]
    )


def as_completions(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Prompts and completions: chats or, for a model without a template, text."""

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": [{"role": "assistant", "content": row["worked_solution"]}]}

    def text(row: dict[str, Any]) -> dict[str, Any]:
        (question,) = row["prompt"]
        return {"prompt": plain_text(question["content"]), "completion": row["worked_solution"]}

    return rows.map(chat if tokenizer.chat_template else text, remove_columns=["worked_solution"])


def accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, problems: int) -> float:
    """The share of held-out problems that greedy answers get right."""
    rows = load_prompts("word-problems", "test").select(range(problems))
    settings = EvalSettings(samples=1, sampling=Sampling(max_new_tokens=96, temperature=0))
    return evaluate(model, tokenizer, rows, settings)["avg_at_k"]


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hub name or a folder")
    parser.add_argument("--output", required=True, help="the teacher's folder")
    parser.add_argument(
        "--solutions", help="train on the samples.jsonl of oprd eval, not on worked solutions"
    )
    parser.add_argument("--minutes", type=float, default=50, help="how long to train (default: 50)")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--batch_size", type=int, default=16, help="solutions per step (default: 16)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="its peak (default: 3e-4)")
    parser.add_argument("--save_steps", type=int, default=50, help="steps between checkpoints (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the problems (default: 0)")
    parser.add_argument("--problems", type=int, default=64, help="held-out ones to measure on (default: 64)")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32"), load_tokenizer(args.model)
    budget = Budget(args.minutes, args.steps)
    optimizer = AdamW(model.parameters(), args.learning_rate, weight_decay=0)
    rows = sampled_solutions(args.solutions) if args.solutions else own_solutions()
    config = SFTConfig(
        output_dir=args.output,
        seed=args.seed,
        max_steps=args.steps or 10**6,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=False,
        bf16=False,  # no faster on a CPU: half of a step is the loss over the vocabulary, in float32 anyway
        logging_steps=10,
        save_steps=args.save_steps,
        save_only_model=True,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=as_completions(rows, tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, budget.rate)),
        callbacks=[budget],
    )
    result = trainer.train()
    trainer.save_model()
    seconds = result.metrics["train_runtime"]
    trained = {"step": result.global_step, "seconds": round(seconds, 1)}
    Path(args.output, "trained.json").write_text(json.dumps(trained) + "\n")
    print(f"{result.global_step} steps in {seconds / 60:.1f} minutes: {args.output}")
    share = accuracy(trainer.model, tokenizer, args.problems)
    print(f"{share:.1%} of {args.problems} held-out problems answered right")


if __name__ == "__main__":
    main()
