"""Twenty OPRD steps on real prompts with random-weight models: does everything load, render and learn?

    python benchmarks/real_prompts.py path/to/dapo-math-17k.parquet --output runs/real

Trains a BPE tokenizer on the prompts' text, makes two random Qwen3 models of a few million
parameters, and runs `oprd train` on the prompts. Prints the loss of every step.
"""

import argparse
from pathlib import Path

import yaml
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM, set_seed

from oprd.folders.recorder import METRICS_FILE, read_metrics
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.rollouts.prompts import load_prompts
from oprd.text.rendering import Renderer
from oprd.training.train import parse_training_recipe, train


def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, width: int, depth: int) -> Path:
    """Save a random Qwen3 model with `tokenizer` in `folder`."""
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(data: Path, output: Path, steps: int = 20, width: int = 256, depth: int = 4) -> list[float]:
    """Render every prompt, train, and return the loss of every step."""
    prompts = load_prompts(str(data))
    tokenizer = train_tokenizer((row["prompt"][0]["content"] for row in prompts), vocab_size=4096)
    lengths = [len(ids) for ids in Renderer(tokenizer)(prompts["prompt"][:])]
    print(f"{len(prompts)} prompts, {min(lengths)} to {max(lengths)} tokens")
    recipe = {
        "model_name_or_path": str(make_model(output / "student", tokenizer, 1, width, depth)),
        "teacher_model_name_or_path": str(make_model(output / "teacher", tokenizer, 2, width, depth)),
        "dataset_name": str(data),
        "output_dir": str(output / "run"),
        "max_prompt_length": 256,
        "max_completion_length": 32,
        "representation_loss": "relative_mse",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": 1.0e-3,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    folder = train(*parse_training_recipe(path))
    return [record["loss/total"] for record in read_metrics(folder / METRICS_FILE)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/real"))
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    for step, loss in enumerate(run(arguments.data, arguments.output, arguments.steps), start=1):
        print(f"step {step:2d}  loss {loss:.4f}")
