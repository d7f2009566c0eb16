"""Tiny Qwen3 pairs of one origin on disk, trainers on them, and rollouts of uneven lengths."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.training.config import OPRDConfig
from oprd.training.train import parse_training_recipe, train
from oprd.training.trainer import OPRDTrainer
from tiny_pair import QUICK, SIZES, ScriptedTrainer, perturb, prompt_texts

__all__ = [
    "copied",
    "dataset",
    "finished",
    "gradient",
    "make_folder",
    "make_trainer",
    "prompts",
    "recipe",
    "roll_out",
    "student",
    "teacher",
    "tokenizer",
]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(prompt_texts(30), vocab_size=290)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., str]:
    """`make_folder(shift=0, family="qwen3", **config)`: a model folder; `shift` perturbs the common origin.

    Every ninth token id ends a response, so that rollouts of random models end at uneven lengths.
    """
    made: dict[str, str] = {}

    def make(shift: int = 0, family: str = "qwen3", **config: Any) -> str:
        key = repr((shift, family, sorted(config.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            torch.manual_seed(0)
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            sizes = SIZES | {"vocab_size": len(tokenizer)} | ids | config
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
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


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": [{"role": "user", "content": text}]}) + "\n" for text in prompt_texts(12)
        )
    )
    return str(path)


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory, student: str, teacher: str, prompts: str) -> Callable:
    """`recipe(output_dir, **changes)`: the parsed recipe of a small composite run."""
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    names = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": prompts,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 0,
        "max_steps": 4,
    }
    file.write_text(yaml.safe_dump(QUICK | names))

    def parse(output_dir: Path, *flags: str) -> Any:
        return parse_training_recipe(file, ["--output_dir", str(output_dir), *flags])

    return parse


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, recipe: Callable) -> Path:
    """The folder of that run, to be copied but not touched."""
    return train(*recipe(tmp_path_factory.mktemp("runs") / "finished"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def flat_gradient(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).double().flatten() for p in parameters]
    )
