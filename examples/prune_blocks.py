"""Take blocks out of a model: a shallower student of the same width, to be healed from the whole model.

python examples/prune_blocks.py --model HuggingFaceTB/SmolLM2-135M-Instruct --blocks 10 --output runs/pruned

The blocks lie in a row. Of all such rows the one goes whose input and output point most nearly the same way
(arXiv 2403.17887), measured on a few prompts. The last line that it prints is the `layers` key of the recipe
that heals the student: each of its layers beside the layer that the whole model had there.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from oprd import capture, load_model, load_prompts, load_tokenizer


@torch.no_grad()
def token_states(model: PreTrainedModel, batch: dict[str, Tensor], layers: int) -> dict[int, Tensor]:
    """States of all layers but the last, which is behind the norm, at the tokens of a batch."""
    rows = batch["attention_mask"].bool()
    with capture(model, range(layers), rows, stop_early=True) as states:
        model(**batch)
    return states


def most_alike(states: dict[int, Tensor], blocks: int) -> int:
    """The layer l for which layer l + `blocks` has the smallest angle to it, on average."""
    angles = {
        layer: torch.cosine_similarity(states[layer], states[layer + blocks], dim=-1)
        .clamp(-1, 1)
        .acos()
        .mean()
        for layer in range(len(states) - blocks)
    }
    return min(angles, key=lambda layer: float(angles[layer]))


def without_blocks(model: PreTrainedModel, first: int, blocks: int) -> PreTrainedModel:
    """A copy without blocks first + 1 … first + `blocks`, 1-based."""
    pruned = copy.deepcopy(model)
    config, stack = pruned.config, pruned.get_decoder()
    kept = [index for index in range(config.num_hidden_layers) if not first <= index < first + blocks]
    stack.layers = nn.ModuleList(stack.layers[index] for index in kept)
    for index, block in enumerate(stack.layers):
        block.self_attn.layer_idx = index  # where its keys and values are kept
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    return pruned


def layer_pairs(depth: int, first: int, blocks: int) -> str:
    """The `layers` key: student layer = teacher layer, for every block that is behind the gap."""
    return ",".join(f"{layer}={layer + blocks}" for layer in range(max(first, 1), depth - blocks + 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--blocks", type=int, required=True, help="how many go")
    parser.add_argument("--data", default="tiny", help="prompts to measure on")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="float32").eval(), load_tokenizer(given.model)
    depth = model.config.num_hidden_layers
    prompts = load_prompts(given.data, "train")[:32]["prompt"]
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    first = most_alike(token_states(model, batch, depth), given.blocks)
    without_blocks(model, first, given.blocks).save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)
    pairs = layer_pairs(depth, first, given.blocks)
    (given.output / "pruned.json").write_text(
        json.dumps({"model": given.model, "first": first, "layers": pairs})
    )
    print(f"blocks {first + 1} to {first + given.blocks} of {depth} are gone\nlayers: {pairs}")


if __name__ == "__main__":
    main()
