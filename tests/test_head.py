"""The LM head applied to final states gives the model's own logits, or is refused."""

import pytest
import torch
import transformers
from transformers import Qwen3ForCausalLM

from oprd.capture import backbone
from oprd.errors import UserError
from oprd.head import Head

SIZES = {
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,
}
SCALED = {
    "plain": ("LlamaConfig", {}),
    "softcap": ("Gemma2Config", {"final_logit_softcapping": 4.0, "head_dim": 8}),
    "no softcap": ("Gemma2Config", {"final_logit_softcapping": None, "head_dim": 8}),
    "logit_scale": ("CohereConfig", {"logit_scale": 0.0625}),
    "logits_scaling": ("GraniteConfig", {"logits_scaling": 8.0}),
    "tied": ("Qwen3Config", {"tie_word_embeddings": True}),
}


def build(name):
    kind, changes = SCALED[name]
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**(SIZES | changes))
    ).eval()


def states_and_logits(model, **kwargs):
    ids = torch.randint(3, 41, (2, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, **kwargs)
    return output.hidden_states[-1].flatten(0, 1), output.logits.flatten(0, 1)


@pytest.mark.parametrize("name", SCALED)
def test_logits_of_scaled_and_capped_heads(name):
    model = build(name)
    states, logits = states_and_logits(model)
    torch.testing.assert_close(Head.of(model, 41)(states), logits, rtol=1e-5, atol=1e-6)
    if name == "softcap":
        assert logits.abs().max() <= 4 and (model.lm_head(states) - logits).abs().max() > 0.1


def test_logits_of_every_family(tiny_model, family):
    model = tiny_model(family)
    states, logits = states_and_logits(model)
    torch.testing.assert_close(Head.of(model, 41)(states), logits, rtol=1e-5, atol=1e-5)


def test_vocabulary_is_cut_to_the_shared_prefix():
    model = build("plain")
    states, logits = states_and_logits(model)
    torch.testing.assert_close(Head.of(model, 30)(states), logits[:, :30], rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_come_in_float32():
    model = build("softcap").bfloat16()
    states, logits = states_and_logits(model)
    given = Head.of(model, 41)(states)
    assert given.dtype == torch.float32
    torch.testing.assert_close(given, logits.float(), rtol=1e-2, atol=1e-2)
    assert Head.of(build("plain").double(), 41)(states.double()).dtype == torch.float64


class Doubled(Qwen3ForCausalLM):
    """An architecture that treats its logits in a way nobody told us about."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.5 * output.logits
        return output


class Shifted(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits[..., 5] += 3
        return output


@pytest.mark.parametrize("kind", [Doubled, Shifted])
@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_a_head_that_does_not_give_the_logits_is_refused(kind, spread):
    torch.manual_seed(0)
    model = kind(transformers.Qwen3Config(**SIZES | {"initializer_range": spread}))
    with pytest.raises(UserError, match=f"LM head of {kind.__name__} .* use output_loss: none"):
        Head.of(model, 41)


@pytest.mark.parametrize("training", [False, True])
def test_the_check_leaves_the_model_as_it_was(training):
    model = build("plain").train(training)
    Head.of(model, 41)
    assert all(module.training is training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_gradients_reach_the_states_and_the_head():
    model = build("softcap")
    states, _ = states_and_logits(model)
    rows = states.detach().requires_grad_()
    Head.of(model, 41)(rows).square().sum().backward()
    assert rows.grad.norm() > 0 and model.lm_head.weight.grad.norm() > 0
    assert all(p.grad is None for p in backbone(model).layers.parameters())
