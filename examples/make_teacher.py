"""Make a teacher of word problems: a model trained further on worked solutions, by TRL's SFTTrainer.

python examples/make_teacher.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output runs/teacher

The teacher lies at the root of the folder. Its checkpoints are models too: students of the same origin, the
weaker the earlier.
"""

import argparse
import time
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


def worked_solutions(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Training problems as prompts and completions: chats or, for a model without a template, text."""
    rows = load_prompts("word-problems", "train")

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": [{"role": "assistant", "content": row["worked_solution"]}]}

    def text(row: dict[str, Any]) -> dict[str, Any]:
        (question,) = row["prompt"]
        return {"prompt": plain_text(question["content"]), "completion": row["worked_solution"]}

    unused = [name for name in rows.column_names if name != "prompt"]
    return rows.map(chat if tokenizer.chat_template else text, remove_columns=unused)


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
    parser.add_argument("--minutes", type=float, default=60, help="how long to train (default: 60)")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--batch_size", type=int, default=16, help="solutions per step (default: 16)")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="its peak (default: 1e-4)")
    parser.add_argument("--save_steps", type=int, default=50, help="steps between checkpoints (default: 50)")
    parser.add_argument("--problems", type=int, default=64, help="held-out ones to measure on (default: 64)")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model, dtype="float32"), load_tokenizer(args.model)
    budget = Budget(args.minutes, args.steps)
    optimizer = AdamW(model.parameters(), args.learning_rate, weight_decay=0)
    config = SFTConfig(
        output_dir=args.output,
        max_steps=args.steps or 10**6,
        per_device_train_batch_size=args.batch_size,
        gradient_checkpointing=False,
        bf16=False,  # under autocast on a CPU SmolLM2's loss fell less in the same few steps; why is open
        logging_steps=10,
        save_steps=args.save_steps,
        save_only_model=True,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=worked_solutions(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer, LambdaLR(optimizer, budget.rate)),
        callbacks=[budget],
    )
    result = trainer.train()
    trainer.save_model()
    print(f"{result.global_step} steps in {result.metrics['train_runtime'] / 60:.1f} minutes: {args.output}")
    share = accuracy(trainer.model, tokenizer, args.problems)
    print(f"{share:.1%} of {args.problems} held-out problems answered right")


if __name__ == "__main__":
    main()
