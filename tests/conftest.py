"""Settings and tiny models shared by the tests: one thread, no network, no telemetry."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch
import transformers
from hypothesis import settings

from oprd.models.tiny import task

task.NUM_TRAIN_PROBLEMS = 1024  # each run renders all of them first: 8,192 take more than a second
settings.register_profile("same", derandomize=True, deadline=None)  # one commit, one result
settings.register_profile("new", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
torch.set_num_threads(1)

VOCABULARY = 41
NUM_LAYERS = 3
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GPT2 = {
    "n_embd": 16,
    "n_layer": NUM_LAYERS,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_IDS = {key: _SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
FAMILIES = {
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", _SIZES),
    "qwen3_moe": ("Qwen3MoeConfig", _SIZES | _EXPERTS),
    "llama": ("LlamaConfig", _SIZES),
    "phi3": ("Phi3Config", _SIZES),
    "gemma2": ("Gemma2Config", _SIZES),
    "gemma3": ("Gemma3TextConfig", _SIZES),
    "gpt2": ("GPT2Config", _GPT2 | _IDS),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each of the tiny architectures in turn."""
    return request.param


@pytest.fixture
def tiny_model():
    """`tiny_model(family="qwen3", seed=0, **config)`: a random causal LM of 3 layers, in eval mode."""

    def build(family: str = "qwen3", seed: int = 0, **config: object) -> transformers.PreTrainedModel:
        name, sizes = FAMILIES[family]
        torch.manual_seed(seed)
        settings = getattr(transformers, name)(**(sizes | config))
        model = transformers.AutoModelForCausalLM.from_config(settings)
        with torch.no_grad():  # Away from the symmetric initialisation: norms and biases differ too.
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    return build
