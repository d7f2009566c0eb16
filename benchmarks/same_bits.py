"""Do losses, gradients and fits stay the same to the bit when the code is rearranged?

    python benchmarks/same_bits.py record before.json      # on the old commit, six minutes on two CPU cores
    python benchmarks/same_bits.py compare before.json     # on the new one: exit code 1 if anything differs

A few steps of every recipe in recipes/tiny and of some settings beside them, through the command line. What
`metrics.jsonl` holds is compared, times and memory aside; of a bridge, the digests of its tensors.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

RECIPES = Path(__file__).parents[1] / "recipes" / "tiny"
BRIDGES = ("bridge", "tokenizer_bridge")
OTHERS = {  # flags of vanilla.yaml
    "bf16": ["--bf16", "true"],
    "accumulated": [
        *("--gradient_accumulation_steps", "4", "--per_device_train_batch_size", "8"),
        *("--gradient_checkpointing", "true"),
    ],
    "packed": ["--max_tokens_per_micro_batch", "512"],
    "adapters": ["--use_peft", "true"],
    "full_vocab": ["--output_loss", "full_vocab", "--output_weight", "1"],
    "top_k": ["--output_loss", "top_k", "--output_weight", "1"],
    "some_rows": ["--layers", "last", "--positions", "last=20", "--representation_loss", "cosine"],
    "switch": ["--output_loss", "sampled_token", "--representation_weight", "0=1,1=0"],
}


def oprd(*words: object) -> None:
    """One command of `oprd`, on one thread."""
    command = [sys.executable, "-m", "oprd.cli", *map(str, words)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)


def fit(name: str, folder: Path) -> dict[str, str]:
    """Digests of the tensors of a bridge, fitted on a few prompts."""
    flags = ["--num_prompts", 128, "--rank", 16, "--output_dir", folder]
    oprd("bridge", RECIPES / f"{name}.yaml", *flags)
    with safe_open(folder / "bridge.safetensors", framework="numpy") as file:
        return {
            key: hashlib.sha256(file.get_tensor(key).tobytes()).hexdigest() for key in sorted(file.keys())
        }


def train(recipe: Path, folder: Path, *flags: object) -> list[dict[str, Any]]:
    """What a run measures at each of three steps."""
    oprd("train", recipe, "--max_steps", 3, "--output_dir", folder, *flags)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))}
        for line in lines
    ]


def measure(work: Path) -> dict[str, Any]:
    """All that is compared, by the name of a recipe or setting."""
    found: dict[str, Any] = {}
    for name in BRIDGES:
        found[name] = fit(name, work / name)
        print(name, flush=True)
    for recipe in sorted(RECIPES.glob("*.yaml")):
        if recipe.stem not in BRIDGES:
            text = recipe.read_text(encoding="utf-8")
            bridge = next(
                (name for name in BRIDGES if f"\nbridge: runs/tiny-{name.replace('_', '-')}" in text), None
            )
            flags = ["--bridge", work / bridge] if bridge else []
            found[recipe.stem] = train(recipe, work / f"run-{recipe.stem}", *flags)
            print(recipe.stem, flush=True)
    for name, flags in OTHERS.items():
        found[f"vanilla, {name}"] = train(RECIPES / "vanilla.yaml", work / f"other-{name}", *flags)
        print(f"vanilla, {name}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = measure(Path(work))
    if given.action == "record":
        given.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    before = json.loads(given.file.read_text(encoding="utf-8"))
    different = [name for name in found.keys() | before.keys() if found.get(name) != before.get(name)]
    print(f"{len(found) - len(different)} of {len(found)} the same to the bit", *sorted(different), sep="\n")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
