"""Runs with given rollouts, alone or under torchrun: `rank_worker.py MODELS OUTPUT MODE RUNS`.

MODELS is a JSON object of names and folders, MODE is ddp, fsdp, fsdp_from_rank_0, where the others are sent
their weights, zero2 or zero3; RUNS is a list of folders below OUTPUT, cases and settings of their own. The
case `recipe` is `oprd train` of the recipe and with the flags that its settings name.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from cpu_sharding import ask_for_fsdp, shard_on_cpu
from oprd.foundation.ranks import leave_ranks
from oprd.models.capture import blocks
from oprd.models.forward import ModelInput, StateRequest
from oprd.training.config import OPRDConfig
from oprd.training.train import parse_training_recipe, train
from tiny_pair import QUICK, ScriptedTrainer, prompt_texts

COMPLETIONS, STEPS = 4, 3
OUTPUT = {"representation_weight": "0", "output_loss": "top_k", "output_top_k": 4}
THROUGH_BRIDGE = {"teacher": "wide", "bridge": "bridge", "representation_loss": "normalized_mse"}
CASES: dict[str, dict[str, Any]] = {
    "representation": {"positions": "last=3"},
    "token": {"representation_loss": "relative_mse", "reduction": "token", "num_generations": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "mask_truncated_completions": True},
    "packed": {"gradient_accumulation_steps": 2, "max_tokens_per_micro_batch": 24},
    "packed_at_once": {"max_tokens_per_micro_batch": 24},  # several backwards in one micro-batch
    "output": OUTPUT,
    "tied": OUTPUT | {"student": "tied", "teacher": "tied_teacher", "diagnostics_steps": 1},
    "phases": {
        "representation_weight": "0=1,2=0",
        "output_weight": "0=0,2=1",
        "output_loss": "full_vocab",
        "gradient_checkpointing": True,
        "keep_attention": True,
    },
    "shallow": {"layers": "1", "gradient_checkpointing": True, "diagnostics_steps": 1},
    "bridge": THROUGH_BRIDGE | {"anchor_weight": "0.5"},
    "adapters": {"lora": True, "output_loss": "sampled_token"},
    "importance": {"row_weights": "importance", "output_loss": "sampled_token", "positions": "last=3"},
    "extrapolated": {"teacher_extrapolation": 1.25, "output_loss": "full_vocab"},
    "adapters_through_bridge": THROUGH_BRIDGE | {"anchor_weight": "0.5", "lora": True},
    "experts": {
        "student": "experts",
        "teacher": "experts_teacher",
        "output_loss": "top_k",
        "output_top_k": 4,
    },
    "offloaded": {"teacher_offload": True, "output_loss": "full_vocab"},
    # The first two prompts of four, those of rank 0, end in rollouts without an EOS.
    "idle_rank": {"mask_truncated_completions": True, "shuffle_dataset": False},
    "idle_rank_output": {
        "mask_truncated_completions": True,
        "shuffle_dataset": False,
        "output_loss": "sampled_token",
    },
}


def run_case(
    name: str, models: dict[str, str], output: Path, ranks: int = 1, sharded: bool = False, **more: Any
) -> ScriptedTrainer:
    """Train as a case says, `more` on top; returns the trainer that did."""
    idle = name.startswith("idle_rank")
    prompts = [[{"role": "user", "content": text}] for text in prompt_texts(4 if idle else 20)]
    first: list[list[int]] = []

    def script(prompt_ids: list[int]) -> list[int]:
        length = 1 + sum(prompt_ids) % 8
        ids = [10 + (sum(prompt_ids) * i) % 7 for i in range(1, length + 1)]
        if idle and prompt_ids in first:
            return [*ids, *([11] * (8 - length))]
        return ids if length == 8 and not idle else [*ids[:-1], 2]

    settings = CASES[name] | more
    student, teacher = settings.pop("student", "student"), settings.pop("teacher", "teacher")
    lora = LoraConfig(r=4, target_modules="all-linear") if settings.pop("lora", False) else None
    scripted = settings.pop("scripted", True)
    resume = settings.pop("resume", False)
    if "bridge" in settings:
        settings["bridge"] = models["bridge"]
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = OPRDConfig(
        **QUICK
        | {"output_dir": str(output / name), "max_steps": STEPS, "optim": "sgd", "max_grad_norm": 1e9}
        | {"per_device_train_batch_size": COMPLETIONS // accumulation // ranks}
        | ({"ddp_backend": "gloo"} if ranks > 1 else {})
        | settings
    )
    if sharded:
        shard_on_cpu(args)
    kind = type("Scripted", (ScriptedTrainer,), {"script": staticmethod(script) if scripted else None})
    trainer = kind(
        model=models[student],
        teacher_model=models[teacher],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        eval_dataset=Dataset.from_dict({"prompt": prompts[:4]}) if args.eval_strategy != "no" else None,
        peft_config=lora,
    )
    if idle:
        first += trainer._tokenize_prompts([prompts[0], prompts[1]])[0]
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


def train_recipe(recipe: str, flags: list[str], sharded: bool) -> None:
    run, config = parse_training_recipe(recipe, [*flags, "--ddp_backend", "gloo"])
    if sharded:
        shard_on_cpu(config)
    train(run, config)


def check_sharded(trainer: ScriptedTrainer) -> None:
    """Every weight of both models is a shard, and one block of a reading teacher is whole at a time."""
    for model in (trainer.model, trainer.teacher.model):
        weights = list(model.parameters())
        assert all(isinstance(weight, DTensor) for weight in weights)
        here = sum(weight.to_local().numel() for weight in weights)
        assert 0.45 < here / sum(weight.numel() for weight in weights) < 0.55
    layers = blocks(trainer.teacher.model)
    gathered = []

    def note(*_: Any) -> None:
        gathered.append([isinstance(next(block.parameters()), DTensor) for block in layers].count(False))

    notes = [block.register_forward_pre_hook(note) for block in layers]
    ids = torch.ones(1, 4, dtype=torch.long)
    request = StateRequest((len(layers),), torch.ones(1, 3, dtype=torch.bool))
    trainer.teacher.read(ModelInput(ids, ids, 0, 3), [request])
    for handle in notes:
        handle.remove()
    assert gathered == [1] * len(layers)
    if trainer.args.bf16:
        assert trainer.accelerator.state.fsdp_plugin.mixed_precision_policy.reduce_dtype == torch.float32


def deepspeed(stage: int) -> dict[str, Any]:
    """DeepSpeed's arguments, on a CPU, where it has to be told."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed").init_distributed("gloo")
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    return {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True} | {
        name: "auto" for name in (*sizes, "gradient_clipping")
    }


def threads() -> list[str]:
    """The names of this process's threads, where the system tells."""
    return [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]


def main() -> None:
    models, output, mode = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    sharded = mode.startswith("fsdp")
    if sharded:
        ask_for_fsdp(from_rank_0=mode == "fsdp_from_rank_0")
    runs = json.loads(sys.argv[4])
    shared = {"deepspeed": deepspeed(int(mode[-1]))} if mode.startswith("zero") else {}
    for folder, case, more in runs:
        if case == "recipe":
            flags = ["--output_dir", str(output / folder), *more["flags"]]
            train_recipe(more["recipe"], flags, sharded)
            continue
        trainer = run_case(case, models, output / folder, 2, sharded, **more | shared)
        assert trainer.accelerator.num_processes == 2
        if sharded:
            check_sharded(trainer)
        trainer.accelerator.wait_for_everyone()
        del trainer
    if not any(more.get("use_vllm") for _, _, more in runs):  # vLLM takes its groups down itself
        leave_ranks()
        if mode == "ddp":  # DTensors' own caches hold the group of a sharded run
            assert not [name for name in threads() if "gloo" in name]  # such as could outlive Python


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
