"""One training run with a colocated engine in a process of its own: `worker.py CASE FOLDER`.

An engine cannot be taken down in the process that made it, and takes over the process' random state.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from oprd.cli import commands as cli
from oprd.models.tiny import task
from oprd.rollouts.engines.student import StudentEngine
from oprd.training.config import OPRDConfig
from oprd.training.trainer import OPRDTrainer
from places import TINY_RECIPES

VANILLA = TINY_RECIPES / "vanilla.yaml"
QUICK = {
    "use_vllm": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 48,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
CUTS = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1}


def make(folder: Path, extra: dict[str, Any] | None = None, **settings: Any) -> OPRDTrainer:
    rows = Dataset.from_list(task.rows("train", 64))
    args = OPRDConfig(output_dir=str(folder), **(QUICK | settings))
    return OPRDTrainer("tiny:student", "tiny:teacher", args, rows, **(extra or {}))


def log_prob_gaps(trainer: OPRDTrainer, batch: dict[str, Any]) -> torch.Tensor:
    """|Δ| of every sampled token's log-prob, by the student's own logits of whole rollouts."""
    gaps = []
    trainer.model.eval()
    for i in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        response = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.cat([prompt, response])[None]).logits[
                0, len(prompt) - 1 : -1
            ]
        ours = logits.log_softmax(-1).gather(-1, response[:, None])[:, 0]
        gaps.append((ours - batch["engine_log_probs"][i, : len(response)]).abs())
        assert not batch["engine_log_probs"][i, len(response) :].any()
    return torch.cat(gaps)


def cuts(folder: Path) -> int:
    """The engine's log-probs are the model's own, whatever is cut, rescaled and penalised in sampling."""
    trainer = make(folder, **CUTS)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(8)])
    print(json.dumps({"gap": log_prob_gaps(trainer, batch).max().item()}))
    return 0


def lora(folder: Path) -> int:
    """Adapters, packed micro-batches and evaluation on held-out prompts."""
    adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="gaussian")
    extra = {"peft_config": adapters, "eval_dataset": Dataset.from_list(task.rows("eval", 8))}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    trainer = make(folder, extra, max_tokens_per_micro_batch=300, **settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    print(json.dumps({"changed": changed, "evaluated": evaluated}))
    return 0


def stale(folder: Path, *flags: str) -> int:
    """An engine that keeps the weights it was started with."""
    from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

    load = Qwen3ForCausalLM.load_weights

    def load_once(self: Any, weights: Any) -> Any:
        return set() if isinstance(weights, list) else load(self, weights)  # a trainer's come as a list

    Qwen3ForCausalLM.load_weights = load_once
    return train(folder, *flags)


def stale_slowly(folder: Path) -> int:
    """The same, with steps so small that rounding in half precision could hide them."""
    return stale(folder, "--learning_rate", "1e-7", "--max_steps", "20")


def scrambled(folder: Path) -> int:
    """A student whose weights move after they were handed over."""
    sync = StudentEngine.sync_weights

    def sync_and_move(self: StudentEngine) -> None:
        sync(self)
        with torch.no_grad():
            next(self._generation.model.parameters()).mul_(1.05)

    StudentEngine.sync_weights = sync_and_move
    return train(folder)


def train(folder: Path, *flags: str) -> int:
    common = ["--use_vllm", "true", "--max_steps", "4", "--warmup_steps", "0", "--output_dir", str(folder)]
    return cli.run(["train", str(VANILLA), *common, *flags])


if __name__ == "__main__":
    case = {function.__name__: function for function in (cuts, lora, stale, stale_slowly, scrambled)}[
        sys.argv[1]
    ]
    sys.exit(case(Path(sys.argv[2])))
