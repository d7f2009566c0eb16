"""Runs with given rollouts, alone or under torchrun: `ddp_worker.py STUDENT TEACHER OUTPUT`."""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_pair import QUICK, ScriptedTrainer, prompt_texts

from oprd.trainer import OPRDConfig

COMPLETIONS, STEPS = 4, 3
CASES: dict[str, dict[str, Any]] = {
    "representation": {"positions": "last=3"},
    "token": {"representation_loss": "relative_mse", "reduction": "token", "num_generations": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "mask_truncated_completions": True},
    "packed": {"gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 24},
    "output": {"representation_weight": "0", "output_loss": "top_k", "output_top_k": 4},
    "phases": {
        "representation_weight": "0=1,2=0",
        "output_weight": "0=0,2=1",
        "output_loss": "full_vocab",
        "gradient_checkpointing": True,
    },
    "shallow": {"layers": "1", "gradient_checkpointing": True},
    # The first two prompts of four, those of rank 0, end in rollouts without an EOS.
    "idle_rank": {"mask_truncated_completions": True, "shuffle_dataset": False},
    "idle_rank_output": {
        "mask_truncated_completions": True,
        "shuffle_dataset": False,
        "output_loss": "sampled_token",
    },
}


def run_case(name: str, student: str, teacher: str, output: Path, processes: int) -> ScriptedTrainer:
    idle = name.startswith("idle_rank")
    prompts = [[{"role": "user", "content": text}] for text in prompt_texts(4 if idle else 20)]
    first: list[list[int]] = []

    def script(prompt_ids: list[int]) -> list[int]:
        length = 1 + sum(prompt_ids) % 8
        ids = [10 + (sum(prompt_ids) * i) % 7 for i in range(1, length + 1)]
        if idle and prompt_ids in first:
            return [*ids, *([11] * (8 - length))]
        return ids if length == 8 and not idle else [*ids[:-1], 2]

    settings = CASES[name]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = OPRDConfig(
        **QUICK
        | {"output_dir": str(output / name), "max_steps": STEPS, "optim": "sgd", "max_grad_norm": 1e9}
        | {"per_device_train_batch_size": COMPLETIONS // accumulation // processes}
        | ({"ddp_backend": "gloo"} if processes > 1 else {})
        | settings
    )
    kind = type("Scripted", (ScriptedTrainer,), {"script": staticmethod(script)})
    trainer = kind(
        model=student, teacher_model=teacher, args=args, train_dataset=Dataset.from_dict({"prompt": prompts})
    )
    if idle:
        first += trainer._tokenize_prompts([prompts[0], prompts[1]])[0]
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    student, teacher, output = sys.argv[1:]
    for case in CASES:
        trainer = run_case(case, student, teacher, Path(output), processes=2)
        assert trainer.accelerator.num_processes == 2
        trainer.accelerator.wait_for_everyone()
