"""Is the plan of `oprd doctor` what a run then takes?

    python benchmarks/memory_plan.py            # the tiny pair and 100 M parameters: results/memory_plan.csv

Every line is one `oprd train --dry_run` in a process of its own: two steps of the longest rollouts, their
`memory/peak_mb` and `memory/rollout_peak_mb` beside what was planned before any weights were loaded.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import hardware, write
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from oprd.models.loading import load_tokenizer

HERE = Path(__file__).parent
COMMON = {"dataset_name": "tiny", "num_generations": 1, "report_to": "none", "positions": "all"}
MODELS = {
    "100m-wide": Qwen3Config(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=False,
    ),
    "100m-vocabulary": Qwen2Config(
        vocab_size=151_936,
        hidden_size=448,
        intermediate_size=1344,
        num_hidden_layers=12,
        num_attention_heads=7,
        num_key_value_heads=7,
        tie_word_embeddings=True,
    ),
}
KL = {"representation_weight": "0", "output_loss": "full_vocab"}
TOP = {"representation_weight": "0", "output_loss": "top_k"}
# micro-batch, micro-batches, response tokens, checkpointing, other keys
SHAPES: list[tuple[int, int, int, bool, dict[str, Any]]] = [
    (2, 2, 384, False, {}),
    (2, 2, 384, True, {}),
    (4, 1, 256, True, TOP),
    (1, 2, 512, False, KL),
    (4, 2, 256, False, {"max_tokens_per_micro_batch": 600}),
    (2, 2, 384, True, {"bf16": True}),
    (2, 2, 128, False, {"optim": "sgd", "layers": "last"}),
    (2, 2, 256, False, {"use_peft": True, "lora_target_modules": "all-linear"}),
]
TINY = [(32, 1, 64, False, {}), (32, 2, 200, False, {}), (64, 2, 200, False, KL), (64, 1, 200, True, {})]


def make_models(folder: Path) -> dict[str, tuple[str, str]]:
    """A random student and teacher of every size, by its name."""
    made = {"tiny": ("tiny:student", "tiny:teacher")}
    for name, config in MODELS.items():
        pair = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            path = folder / f"{name}-{seed}"
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
            load_tokenizer("tiny:student").save_pretrained(path)
            pair.append(str(path))
        made[name] = pair[0], pair[1]
    return made


def measure(folder: Path, recipe: dict[str, Any]) -> dict[str, int]:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "oprd.cli", "train", str(path), "--dry_run"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    found = re.findall(r"memory/(\w+)_mb ([\d,]+) \(planned ([\d,]+)\)", result.stdout)
    row = {}
    for name, *sizes in found:
        row[f"{name}_mb"], row[f"planned_{name}_mb"] = (int(size.replace(",", "")) for size in sizes)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=HERE / "results" / "memory_plan.csv")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, (student, teacher) in make_models(folder).items():
            for micro_batch, accumulation, tokens, checkpointing, keys in TINY if name == "tiny" else SHAPES:
                shape = {
                    "per_device_train_batch_size": micro_batch,
                    "gradient_accumulation_steps": accumulation,
                    "max_completion_length": tokens,
                    "gradient_checkpointing": checkpointing,
                }
                models = {"model_name_or_path": student, "teacher_model_name_or_path": teacher}
                recipe = COMMON | models | {"output_dir": str(folder / "run"), "bf16": False} | shape | keys
                peaks = measure(folder, recipe)
                other = " ".join(f"{key}={value}" for key, value in keys.items())
                rows.append({"models": name} | shape | {"keys": other} | peaks | hardware())
                write(given.output, rows)
                print(name, shape, other, peaks, flush=True)
    for peak in ("peak_mb", "rollout_peak_mb"):
        ratios = [row[f"planned_{peak}"] / row[peak] for row in rows]
        print(f"planned ÷ measured {peak}: {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
