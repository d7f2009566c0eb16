"""A few tokens through a model: what oprd cannot read is told before the first rollout."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.foundation.errors import UserError
from oprd.models.capture import capture, num_layers
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.models.trial import try_states
from oprd.rollouts.trial import try_rollout

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A decoder that is called one's head, blocks that return lists, a stack that the model does not name.
UNUSUAL = {
    "modernbert-decoder": {},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama4_text": {"intermediate_size_mlp": 48, "num_local_experts": 2},
}
PER_LAYER = {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
SEVERAL_STATES = {"gemma3n_text": PER_LAYER | {"layer_types": ["sliding_attention", "full_attention"]}}


def build(kind, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | sizes)
    return AutoModelForCausalLM.from_config(config).float().eval()


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_models_are_read(kind):
    model = build(kind, **UNUSUAL[kind])
    layers = list(range(1, num_layers(model) + 1))
    assert layers == [1, 2]
    try_states("student", model, layers)
    ids = torch.tensor([[5, 6, 7, 8]])
    with capture(model, [0, *layers]) as states, torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    for layer in (0, 1, 2):
        assert torch.equal(states[layer], output.hidden_states[layer])


@pytest.mark.parametrize("kind", SEVERAL_STATES)
def test_layers_of_several_states_are_refused_unless_unread(kind):
    model = build(kind, **SEVERAL_STATES[kind])
    with pytest.raises(UserError, match=r"the teacher \(Gemma3n\w+\), layer 1, gives states of shape"):
        try_states("teacher", model, [1, 2])
    try_states("teacher", model, [2])


def test_states_that_see_later_tokens_are_refused():
    with pytest.raises(UserError, match="layer 1, gives states that depend on later tokens"):
        try_states("student", build("gemma3_text", use_bidirectional_attention=True), [1])
    try_states("student", build("gemma3_text"), [1, 2])


def test_what_a_forward_raises_is_told_of_the_model():
    model = build("llama")
    model.model.layers[1].mlp.down_proj = torch.nn.Linear(7, 32)
    says = r"the student \(LlamaForCausalLM\) is not built as oprd reads models: mat1 and mat2"
    with pytest.raises(UserError, match=says):
        try_states("student", model, [1, 2])
    with pytest.raises(UserError, match=says):
        try_rollout(model, train_tokenizer(["some words"] * 9, vocab_size=270))


def test_memory_that_runs_out_stays_what_it_is(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model.model, "forward", lambda **_: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="memory") as told:
        try_states("student", model, [1])
    assert not isinstance(told.value, UserError)


def test_modes_are_left_as_they_were():
    model = build("llama").train()
    model.model.layers[0].eval()
    try_states("student", model, [1, 2])
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
