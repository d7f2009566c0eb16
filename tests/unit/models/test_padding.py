"""Batches change nothing, whatever the layers: recurrent models that mask padding, and some that do not."""

import pytest
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from oprd.foundation.errors import UserError
from oprd.models.capture import num_layers
from oprd.models.forward import ModelInput, StateRequest, read_states
from oprd.models.loading import TINY_MODELS, load_tokenizer
from oprd.models.padding import check_sharded, generation_batches, heeds_padding
from oprd.rollouts.generation import Sampling, generate, left_pad

VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
MASKING = {
    "qwen3": {},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 8},
    "bamba": MAMBA | {"mamba_n_groups": 1, "attn_layer_indices": [1]},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8},
        "use_mamba_kernels": False,
    },
    "qwen3_next": LINEAR
    | {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "num_experts": 0}
    | {"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
}
IGNORING = {
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "conv1d_width": 4},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
}
# Masked in the prompt, but not in what follows (transformers 5.23).
LATE = {"minimax": LINEAR | {"num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 8}}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15, 16], [17]]
RESPONSES = [[20, 21, 22], [23, 24], [25, 26, 27, 28], [29]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(TINY_MODELS / "student"))


def make(kind, dtype=torch.float32, **keys):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **COMMON | (MASKING | IGNORING | LATE)[kind] | keys)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def reading(prompts, responses):
    ids = pad_sequence([torch.tensor(response) for response in responses], batch_first=True)
    mask = pad_sequence([torch.ones(len(response)).long() for response in responses], batch_first=True)
    return ModelInput.of(*left_pad(prompts, 0), ids, mask), mask.bool()


def states(model, prompts, responses, **request):
    read, mask = reading(prompts, responses)
    (found,) = read_states(model, read, [StateRequest((1, num_layers(model)), mask, **request)])
    return found


@pytest.mark.parametrize("kind", [*MASKING, *IGNORING, *LATE])
def test_what_a_model_makes_of_a_rollout_does_not_depend_on_its_batch(kind, tokenizer):
    model = make(kind)
    assert heeds_padding(model) is (kind not in IGNORING)
    with torch.no_grad():
        together = states(model, PROMPTS, RESPONSES)
        alone = [states(model, [p], [r]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    for layer, value in together.items():
        torch.testing.assert_close(value, torch.cat([one[layer] for one in alone]), rtol=1e-4, atol=1e-5)
    greedy = Sampling(6, temperature=0)
    drawn = generate(model, tokenizer, PROMPTS, greedy, 0)
    assert drawn == [generate(model, tokenizer, [prompt], greedy, 0)[0] for prompt in PROMPTS]


def test_prompts_share_a_batch_where_they_may():
    batches = {kind: generation_batches(make(kind), PROMPTS) for kind in ("mamba", *IGNORING, *LATE)}
    assert batches == {
        "mamba": [[0, 1, 2, 3]],
        "recurrent_gemma": [[0, 2], [1], [3]],
        "minimax": [[0, 2], [1], [3]],
        "rwkv": [[0], [1], [2], [3]],  # its cached states mix even rows of one length
    }


def test_half_precision_is_not_taken_for_padding():
    for kind in ("qwen3", "mamba"):
        model = make(kind, torch.bfloat16)
        assert heeds_padding(model) and len(generation_batches(model, PROMPTS)) == 1
    assert not heeds_padding(make("rwkv", torch.bfloat16))


def test_losses_at_the_hook_and_their_gradient_are_those_of_rollouts_alone():
    model = make("recurrent_gemma").train()
    weights = torch.linspace(-1, 1, sum(map(len, RESPONSES)))

    def gradient(prompts, responses, weights):
        model.zero_grad()
        values = states(
            model, prompts, responses, transform=lambda layer, x: layer * weights @ x.pow(2).sum(-1)
        )
        sum(values.values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    parts = weights.split(list(map(len, RESPONSES)))
    alone = [gradient([p], [r], w) for p, r, w in zip(PROMPTS, RESPONSES, parts, strict=True)]
    together = gradient(PROMPTS, RESPONSES, weights)
    assert (together - sum(alone)).norm() <= 1e-5 * together.norm()


def test_a_model_that_ignores_padding_is_not_sharded():
    check_sharded([make("mamba"), make("qwen3")])
    with pytest.raises(UserError, match="RwkvForCausalLM reads padding as text"):
        check_sharded([make("mamba"), make("rwkv")])


def test_what_cannot_be_tried_is_taken_to_heed_padding():
    sizes = {"vocab_size": VOCABULARY + 1}  # what was found of an architecture is kept
    with torch.device("meta"):
        assert heeds_padding(make("recurrent_gemma", **sizes))
    assert not heeds_padding(make("recurrent_gemma", **sizes))
