"""Tiny Qwen3 pairs of one origin on disk, trainers on them, and rollouts of uneven lengths."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from oprd.tiny.tokenizer import train_tokenizer
from oprd.trainer import OPRDConfig, OPRDTrainer

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
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


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(prompt_texts(30), vocab_size=290)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., str]:
    """`make_folder(shift=0, **config)`: a model folder; `shift` perturbs the common origin.

    Every ninth token id ends a response, so that rollouts of random models end at uneven lengths.
    """
    made: dict[str, str] = {}

    def make(shift: int = 0, **config: Any) -> str:
        key = repr((shift, sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            torch.manual_seed(0)
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            model = Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"vocab_size": len(tokenizer)} | ids | config)))
            if shift:
                perturb(model, shift)
            model.generation_config.eos_token_id = [
                tokenizer.eos_token_id,
                *range(9, len(tokenizer), 9),
            ]
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def student(make_folder: Callable[..., str]) -> str:
    return make_folder(1)


@pytest.fixture(scope="session")
def teacher(make_folder: Callable[..., str]) -> str:
    return make_folder(2)


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in prompt_texts(24)]})


@pytest.fixture
def make_trainer(
    tmp_path: Path, student: str, teacher: str, dataset: Dataset
) -> Callable[..., ScriptedTrainer]:
    """`make_trainer(student=…, teacher=…, script=…, dataset=…, **config)`: ready, in float32."""
    plain = {"student": student, "teacher": teacher, "dataset": dataset}

    def make(
        script: Callable | None = None, extra: dict[str, Any] | None = None, **config: Any
    ) -> ScriptedTrainer:
        given = {name: config.pop(name, value) for name, value in plain.items()}
        args = OPRDConfig(**({"output_dir": str(tmp_path / "run")} | QUICK | config))
        kind = type("Scripted", (ScriptedTrainer,), {"script": staticmethod(script) if script else None})
        return kind(
            model=given["student"],
            teacher_model=given["teacher"],
            args=args,
            train_dataset=given["dataset"],
            **(extra or {}),
        )

    return make


@pytest.fixture
def roll_out() -> Callable[..., dict[str, Any]]:
    """`roll_out(trainer, count=6)`: the batch of the first prompts, as a training step would see it."""

    def roll(trainer: OPRDTrainer, count: int = 6) -> dict[str, Any]:
        trainer.model.train()
        torch.manual_seed(0)
        rows = [trainer.train_dataset[i] for i in range(count)]
        return trainer._generate_and_score_completions(rows)

    return roll


@pytest.fixture
def gradient() -> Callable[..., tuple[float, torch.Tensor]]:
    """`gradient(trainer, *batches)`: summed loss and the gradient of its sum, as one vector."""

    def compute(trainer: OPRDTrainer, *batches: dict[str, Any]) -> tuple[float, torch.Tensor]:
        trainer.model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            total += loss.item()
        return total, flat_gradient(trainer.model.parameters())

    return compute


def flat_gradient(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).double().flatten() for p in parameters]
    )
