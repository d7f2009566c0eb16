"""A student with its adapters merged, by hand."""

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def merged_weights(folder, student, rslora, dtype="auto"):
    """W + (α/r) B A; with DoRA, its rows scaled to the magnitudes that were learned."""
    weights = AutoModelForCausalLM.from_pretrained(student, dtype=dtype).state_dict()
    adapters = load_file(folder / "adapter_model.safetensors")
    scale = 8 / (2 if rslora else 4)
    for name in {name.partition(".lora_")[0] for name in adapters}:
        a, b = (adapters[f"{name}.lora_{side}.weight"].double() for side in "AB")
        target = name.removeprefix("base_model.model.") + ".weight"
        merged = weights[target].double() + scale * b @ a
        if (magnitude := adapters.get(f"{name}.lora_magnitude_vector")) is not None:
            merged *= (magnitude.double() / merged.norm(dim=1))[:, None]
        weights[target] = merged.to(weights[target].dtype)
    return weights
