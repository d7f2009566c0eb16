"""Attention that the backward of checkpointed blocks does not run again."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from oprd.foundation.errors import UserError
from oprd.models.activation_checkpointing import attention_kept, check_attention_kept, checkpoint_blocks
from spies import FLASH, Runs

LAYERS = 3
IDS = torch.arange(2 * 19).view(2, 19)
PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(5), 0)


@pytest.fixture
def model(tiny_model):
    return tiny_model().train()


def update(model, mask=None):
    """The gradients of an update, and how often attention ran in it."""
    with Runs(FLASH) as runs:
        model(input_ids=IDS, attention_mask=mask).logits.square().mean().backward()
    return gradients(model), runs.count


def gradients(model):
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def equal(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_gradients_are_those_of_plain_checkpointing_and_attention_runs_once(model, mask):
    whole, runs = update(model, mask)
    assert runs == LAYERS
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, runs = update(model, mask)
    assert runs == 2 * LAYERS
    with attention_kept(model):
        kept, runs = update(model, mask)
    assert runs == LAYERS and equal(kept, plain)
    torch.testing.assert_close(kept, whole)
    assert update(model, mask)[1] == 2 * LAYERS  # as it was


def test_every_architecture(family, tiny_model):
    """Where attention is fused it runs once; gradients are the same to the bit everywhere."""
    model = tiny_model(family).train()
    checkpoint_blocks(model, None)
    plain, runs = update(model, PADDED)
    with attention_kept(model):
        kept, fewer = update(model, PADDED)
    assert equal(kept, plain) and fewer == runs / 2
    assert runs == (0 if family == "gemma2" else 2 * LAYERS)  # whose attention is eager


def test_under_autocast(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.autocast("cpu", torch.bfloat16):
        plain, _ = update(model)
        with attention_kept(model):
            kept, runs = update(model)
    assert runs == LAYERS and equal(kept, plain)


def test_the_backward_may_come_when_the_context_is_gone(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, _ = update(model)
    with Runs(FLASH) as runs:
        with attention_kept(model):
            loss = model(input_ids=IDS).logits.square().mean()
        loss.backward()
    assert runs.count == LAYERS and equal(gradients(model), plain)


def test_two_backwards_of_one_forward(model):
    """The second one finds nothing kept, and runs attention."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plain, _ = update(model)
    with attention_kept(model):
        loss = model(input_ids=IDS).logits.square().mean()
    for runs in (0, LAYERS):
        with Runs(FLASH) as counted:
            loss.backward(retain_graph=True)
        assert counted.count == runs and equal(gradients(model), plain)


def test_blocks_that_do_not_checkpoint_run_once_anyhow(model):
    checkpoint_blocks(model, {"every_n_layers": 2})
    assert [block.gradient_checkpointing for block in model.model.layers] == [True, False, True]
    plain, runs = update(model)
    assert runs == LAYERS + 2
    with attention_kept(model):
        kept, runs = update(model)
    assert runs == LAYERS and equal(kept, plain)


class TwoAttentions(nn.Module):
    """A block with two attentions of different inputs, dropout in the first and after it."""

    gradient_checkpointing = True
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, dropout):
        super().__init__()
        self.dropout, self.weight = dropout, nn.Parameter(torch.randn(8, 8))

    def attend(self, states):
        first = states @ self.weight
        for dropout in (self.dropout, 0.0):
            first = scaled_dot_product_attention(first, first, states, dropout_p=dropout, is_causal=True)
            first = nn.functional.dropout(first, 0.5)
        return first

    def forward(self, states):
        return self._gradient_checkpointing_func(self.attend, states)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_random_numbers_are_those_of_the_forward(dropout):
    """Attention that draws some is run again, so that those drawn after it are the same."""
    torch.manual_seed(0)
    block, states = TwoAttentions(dropout), torch.randn(2, 1, 6, 8)
    found = []
    for run in (block.attend, block):
        for kept in (False, True):
            torch.manual_seed(1)
            with attention_kept(block) if kept else torch.enable_grad():
                run(states).square().sum().backward()
            found.append(block.weight.grad)
            block.weight.grad = None
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_evaluation_and_no_grad_are_left_alone(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        with attention_kept(model), Runs(FLASH) as runs:
            assert torch.equal(model(input_ids=IDS).logits, plain)
    assert runs.count == LAYERS


@pytest.mark.parametrize(
    ("checkpointing", "kwargs", "attention", "cause"),
    [
        (False, None, "sdpa", "gradient_checkpointing is off"),
        (True, {"use_reentrant": True}, "sdpa", "without use_reentrant: false"),
        (True, {"early_stop": False}, "sdpa", "without use_reentrant: false"),  # torch's default is true
        (True, None, "eager", "attn_implementation is eager"),
    ],
)
def test_where_nothing_would_be_kept_is_told(model, checkpointing, kwargs, attention, cause):
    for fine in (None, {"use_reentrant": False}, {"every_n_layers": 2}):
        check_attention_kept(model, True, fine)
    model.set_attn_implementation(attention)
    with pytest.raises(UserError, match=f"keep_attention: true, but .*{cause}.*: leave it out"):
        check_attention_kept(model, checkpointing, kwargs)
