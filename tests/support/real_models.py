"""Real models for tests: folders below `OPRD_REAL_MODELS`, or what Hugging Face's cache holds."""

import os
from pathlib import Path

import pytest
from huggingface_hub import try_to_load_from_cache

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
QWEN = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
GEMMA = "google/gemma-3-270m"
FOLDER = os.environ.get("OPRD_REAL_MODELS")


def real_model(name: str) -> str:
    """What loads the model of a Hub name without a network; the test is skipped where it is not laid."""
    if FOLDER is not None:
        folder = Path(FOLDER) / name.rpartition("/")[2].lower()
        if (folder / "config.json").exists():
            return str(folder)
    elif isinstance(try_to_load_from_cache(name, "config.json"), str):
        return name
    pytest.skip(f"{name} is not here: OPRD_REAL_MODELS names a folder of model folders")
