"""Sizes, settings and a trainer with given rollouts, for the fixtures and the distributed worker."""

from collections.abc import Callable
from typing import Any

import torch

from oprd.training.trainer import OPRDTrainer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
QUICK = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 1,
    "max_completion_length": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class ScriptedTrainer(OPRDTrainer):
    """An `OPRDTrainer` whose rollouts may be given: prompt ids to completion ids."""

    script: Callable[[list[int]], list[int]] | None = None

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.script is None:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return [type(self).script(ids) for ids in prompt_ids]


def prompt_texts(count: int) -> list[str]:
    return [f"What is {7 * i + 3} plus {i}{' and then ' * (i % 3)}?" for i in range(count)]


def perturb(model: torch.nn.Module, seed: int, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
