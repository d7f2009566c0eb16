"""The LM head applied to final states gives the model's own logits, or is refused."""

import copy

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import Qwen3ForCausalLM

from oprd import output_space
from oprd.foundation.errors import UserError
from oprd.models.capture import backbone
from oprd.models.lm_head import Head, check_head

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


# The loss in chunks


def make_head(dtype=torch.float64, bias=True, vocabulary=11, **kind):
    torch.manual_seed(0)
    return Head(
        torch.nn.Linear(6, 13, bias=bias, dtype=dtype),
        vocabulary=vocabulary,
        **({"scale": 1.0, "softcap": None} | kind),
    )


def make_rows(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(count, 6, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    others = torch.randn(count, 11, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(11, (count,), generator=generator)
    return rows, others, tokens, torch.rand(count, generator=generator, dtype=torch.float64)


def mixed(logits, teacher_logits, tokens):
    value = output_space.full_vocab(logits, teacher_logits)
    return value + 0.3 * output_space.sampled_token(logits, teacher_logits, tokens)


def dense(head, rows, others, tokens, weights):
    """The whole of the logits, by autograd."""
    logits = (
        torch.nn.functional.linear(rows, head.linear.weight, head.linear.bias)[:, : head.vocabulary]
        * head.scale
    )
    if head.softcap:
        logits = head.softcap * (logits / head.softcap).tanh()
    values = mixed(logits, others, tokens)
    return (values * weights.to(values)).sum(), values


@pytest.mark.parametrize("num_rows", [0, 1, 7])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("bias", "kind"), [(True, {}), (False, {"scale": 0.3, "softcap": 2.0}), (False, {"vocabulary": 9})]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_chunks_equal_the_whole(num_rows, chunk_size, bias, kind, dtype, tolerance):
    head = make_head(dtype, bias, **kind)
    rows, others, tokens, weights = make_rows(num_rows, dtype)
    others, tokens = others[:, : head.vocabulary], tokens % head.vocabulary
    inputs = [rows, *head.linear.parameters()]
    whole, values = dense(head, rows, others, tokens, weights)
    wanted = torch.autograd.grad(3 * whole, inputs)
    widest = []

    def loss(logits, *rest):
        widest.append(len(logits))
        return mixed(logits, *rest)

    total, given = head.weighted_loss(loss, rows, (others, tokens), weights, chunk_size)
    gradients = torch.autograd.grad(3 * total, inputs)
    torch.testing.assert_close(total, whole, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(given, values.detach(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert not given.requires_grad
    assert widest == [min(chunk_size, num_rows - i) for i in range(0, max(num_rows, 1), chunk_size)]
    assert torch.equal(head.in_chunks(mixed, rows, (others, tokens), chunk_size), given)


def test_a_frozen_head_and_frozen_rows():
    head = make_head()
    rows, others, tokens, weights = make_rows(5)
    head.linear.requires_grad_(False)
    total, _ = head.weighted_loss(mixed, rows, (others, tokens), weights, 2)
    total.backward()
    assert rows.grad.norm() > 0 and head.linear.weight.grad is None
    head.linear.requires_grad_(True)
    total, _ = head.weighted_loss(mixed, rows.detach(), (others, tokens), weights, 2)
    total.backward()
    assert head.linear.weight.grad.norm() > 0 and head.linear.bias.grad.norm() > 0


def test_without_gradients_none_are_taken(monkeypatch):
    head = make_head()
    rows, others, tokens, weights = make_rows(5)
    wanted, _ = head.weighted_loss(mixed, rows, (others, tokens), weights, 2)
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.no_grad():
        total, _ = head.weighted_loss(mixed, rows, (others, tokens), weights, 2)
    assert torch.equal(total, wanted.detach()) and not total.requires_grad


def test_the_gradient_is_taken_once():
    head = make_head()
    rows, others, tokens, weights = make_rows(5)
    total, _ = head.weighted_loss(mixed, rows, (others, tokens), weights, 2)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_makes_float32_logits_and_sums_in_float32(autocast):
    """As far from the exact gradient as rounding the inputs goes, not as rounding every logit would."""
    exact = make_head()
    rows, others, tokens, weights = make_rows(64)
    others = others.float()
    half = Head(copy.deepcopy(exact.linear).to(torch.float32 if autocast else torch.bfloat16), 1.0, None, 11)
    exact.linear.load_state_dict({k: v.double() for k, v in half.linear.state_dict().items()})
    given = rows.detach().to(torch.float32 if autocast else torch.bfloat16).requires_grad_()
    precise = given.detach().double().requires_grad_()
    kinds = set()

    def loss(logits, *rest):
        kinds.add(logits.dtype)
        return mixed(logits, *rest)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, values = half.weighted_loss(loss, given, (others, tokens), weights, 3)
    total.backward()
    wanted, _ = dense(exact, precise, others, tokens, weights)
    wanted.backward()
    assert kinds == {torch.float32} and values.dtype == total.dtype == torch.float32
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for ours, theirs in ((given.grad, precise.grad), (half.linear.weight.grad, exact.linear.weight.grad)):
        assert (ours.double() - theirs).norm() < 4e-3 * theirs.norm()


@pytest.mark.parametrize(
    ("num_teacher", "num_tokens", "num_weights"), [(6, 7, 7), (8, 7, 7), (7, 6, 7), (7, 7, 8)]
)
def test_chunks_refuse_rows_that_do_not_match(num_teacher, num_tokens, num_weights):
    others = torch.zeros(num_teacher, 11), torch.zeros(num_tokens, dtype=torch.long)
    with pytest.raises(UserError, match="rows do not pair up"):
        make_head(torch.float32).weighted_loss(mixed, torch.zeros(7, 6), others, torch.zeros(num_weights), 3)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_refuse_a_size_below_one(chunk_size):
    rows, others, tokens, weights = make_rows(7)
    with pytest.raises(UserError, match="chunk_size must be 1 or more"):
        make_head().weighted_loss(mixed, rows, (others, tokens), weights, chunk_size)
    with pytest.raises(UserError, match="chunk_size must be 1 or more"):
        make_head().in_chunks(mixed, rows, (others, tokens), chunk_size)


def test_a_head_that_is_no_plain_linear_layer_is_read_by_its_own_forward():
    class Adapted(torch.nn.Linear):
        def forward(self, rows):
            return 2 * super().forward(rows)

    head = Head(Adapted(6, 13, dtype=torch.float64), 1.0, None, 11)
    rows, others, tokens, _ = make_rows(7)
    torch.testing.assert_close(head(rows), head.linear(rows)[:, :11])
    torch.testing.assert_close(
        head.in_chunks(mixed, rows, (others, tokens), 3), mixed(head(rows), others, tokens).detach()
    )


def test_a_head_that_is_spread_over_devices_is_refused_with_the_cause():
    model = build("plain")
    add_hook_to_module(model.lm_head, ModelHook())
    check_head(model, is_trained=False)
    with pytest.raises(UserError, match="one process for each GPU"):
        check_head(model, is_trained=True)


def test_float16_keeps_rows_of_a_small_share():
    """Rows of a large batch weigh less than float16 can tell from 0, and the loss is scaled afterwards."""
    exact = make_head()
    rows, others, tokens, weights = make_rows(64)
    weights, scale = weights * 1e-6, 2.0**16
    half = Head(copy.deepcopy(exact.linear).half(), 1.0, None, 11)
    exact.linear.load_state_dict({k: v.double() for k, v in half.linear.state_dict().items()})
    given = rows.detach().half().requires_grad_()
    precise = given.detach().double().requires_grad_()
    total, _ = half.weighted_loss(mixed, given, (others.float(), tokens), weights, 3)
    (total * scale).backward()
    wanted, _ = dense(exact, precise, others.float(), tokens, weights)
    (wanted * scale).backward()
    for ours, theirs in ((given.grad, precise.grad), (half.linear.weight.grad, exact.linear.weight.grad)):
        assert ours.dtype == torch.float16 and (ours.double() - theirs).norm() < 1e-3 * theirs.norm()
