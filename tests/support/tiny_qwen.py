"""A random Qwen3 of two layers for a tokenizer."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def tiny_qwen(tokenizer, **config):
    """The same weights for the same arguments; `config` adds to its config."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(**sizes | config))
