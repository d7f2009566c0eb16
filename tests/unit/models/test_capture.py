"""Captured states against `output_hidden_states=True`, bitwise, in value and gradient."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, PreTrainedConfig

from oprd.foundation.errors import UserError
from oprd.models.capture import blocks, capture, num_layers
from oprd.models.forward import ModelInput, StateRequest, read_states

NUM_LAYERS = 3
EVERY_LAYER = list(range(NUM_LAYERS + 1))
MODES = ["eval", "train", "checkpointed", "checkpointed-reentrant"]
VOCABULARY = 41


@pytest.fixture
def batch():
    """Three sequences of 7 tokens, two of them left-padded; and rows that skip padding and more."""
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    mask[2, :1] = 0
    rows = (torch.rand(3, 7) < 0.5) & mask.bool()
    rows[1, 6] = True
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 7)), "attention_mask": mask}, rows


def set_mode(model, mode):
    """Train or eval, with or without gradient checkpointing of either kind."""
    model.train(mode != "eval")
    if mode.startswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": mode.endswith("reentrant")})
        assert model.is_gradient_checkpointing
        if mode.endswith("reentrant"):
            model.enable_input_require_grads()
    return model


def plain_states(model, inputs):
    """What Hugging Face returns, for a model that does not checkpoint."""
    assert not model.is_gradient_checkpointing
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == NUM_LAYERS + 1
    return states


def weighted_sum(states):
    """A scalar in which every entry of every state has its own weight."""
    total = 0
    for layer, state in sorted(states.items()):
        generator = torch.Generator().manual_seed(layer)
        total = total + (state * torch.rand(state.shape, generator=generator)).sum()
    return total


def gradients(model, scalar):
    """The gradient of every trainable parameter, zeros where none flows, and clears it."""
    scalar.backward()
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(actual, wanted):
    assert actual.keys() == wanted.keys()
    assert max(gradient.abs().max() for gradient in wanted.values()) > 1e-2
    for name, gradient in wanted.items():
        assert torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max()), name


def count_hooks(model):
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


def lora(model):
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


# Equality with Hugging Face's hidden states


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_of_every_architecture(family, mode, tiny_model, batch):
    inputs, rows = batch
    model = tiny_model(family).train(mode != "eval")
    plain = plain_states(model, inputs)
    wanted = gradients(model, weighted_sum(dict(enumerate(plain))))
    wanted_rows = gradients(
        model, weighted_sum({i: h[rows] for i, h in enumerate(plain_states(model, inputs))})
    )

    set_mode(model, mode)
    with capture(model, EVERY_LAYER) as states:
        model(**inputs)
    assert sorted(states) == EVERY_LAYER
    for layer, state in states.items():
        assert torch.equal(state, plain[layer]), layer
    assert_same_gradients(gradients(model, weighted_sum(states)), wanted)

    with capture(model, EVERY_LAYER, rows=rows) as states:
        model(**inputs)
    for layer, state in states.items():
        assert torch.equal(state, plain[layer][rows]), layer
    assert_same_gradients(gradients(model, weighted_sum(states)), wanted_rows)


@pytest.mark.parametrize("mode", MODES)
def test_captured_states_equal_those_of_the_same_forward(mode, tiny_model, batch):
    inputs, _ = batch
    model = set_mode(tiny_model(), mode)
    with capture(model, EVERY_LAYER) as states:
        hidden = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(states[layer], hidden[layer]) for layer in EVERY_LAYER)


@pytest.mark.parametrize("mode", MODES)
def test_lora(mode, tiny_model, batch):
    inputs, rows = batch
    model = lora(tiny_model()).train(mode != "eval")
    plain = model(**inputs, output_hidden_states=True).hidden_states
    wanted = gradients(model, weighted_sum({i: plain[i][rows] for i in (1, 3)}))
    assert all("lora" in name for name in wanted)
    set_mode(model, mode)
    with capture(model, [1, 3], rows=rows) as states:
        model(**inputs)
    assert torch.equal(states[1], plain[1][rows]) and torch.equal(states[3], plain[3][rows])
    assert_same_gradients(gradients(model, weighted_sum(states)), wanted)


@pytest.mark.parametrize("layers", [[0], [2], [3], [3, 0, 1]], ids=str)
def test_any_subset_in_any_order(layers, tiny_model, batch):
    inputs, rows = batch
    model = tiny_model()
    plain = plain_states(model, inputs)
    with capture(model, layers, rows=rows) as states:
        model(**inputs)
    assert sorted(states) == sorted(layers)
    assert all(torch.equal(states[layer], plain[layer][rows]) for layer in layers)


def test_last_layer_before_the_final_norm(family, tiny_model, batch):
    inputs, _ = batch
    model = tiny_model(family)
    plain = plain_states(model, inputs)
    with capture(model, EVERY_LAYER, final_norm=False) as states:
        model(**inputs)
    assert all(torch.equal(states[layer], plain[layer]) for layer in EVERY_LAYER[:-1])
    norm = model.transformer.ln_f if family == "gpt2" else model.model.norm
    assert not torch.equal(states[NUM_LAYERS], plain[NUM_LAYERS])
    assert torch.equal(norm(states[NUM_LAYERS]), plain[NUM_LAYERS])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_a_graph(context, tiny_model, batch):
    inputs, rows = batch
    model = tiny_model()
    with context(), capture(model, EVERY_LAYER, rows=rows) as states:
        model(**inputs)
    plain = plain_states(model, inputs)
    for layer, state in states.items():
        assert torch.equal(state, plain[layer][rows]) and not state.requires_grad


def test_bfloat16_model_gives_bfloat16_states(tiny_model, batch):
    inputs, rows = batch
    model = tiny_model().bfloat16()
    plain = plain_states(model, inputs)
    with capture(model, EVERY_LAYER, rows=rows) as states:
        model(**inputs)
    for layer, state in states.items():
        assert state.dtype == torch.bfloat16 and torch.equal(state, plain[layer][rows])


@pytest.mark.parametrize("mode", MODES[1:])
def test_no_rows_is_an_empty_state_in_the_graph(mode, tiny_model, batch):
    inputs, rows = batch
    model = set_mode(tiny_model(), mode)
    with capture(model, EVERY_LAYER, rows=torch.zeros_like(rows)) as states:
        model(**inputs)
    assert all(state.shape == (0, 16) and state.requires_grad for state in states.values())
    sum(state.sum() for state in states.values()).backward()
    reached = [p for name, p in model.named_parameters() if "lm_head" not in name]
    assert all(p.grad is not None and (p.grad == 0).all() for p in reached)


def test_wrapped_model(tiny_model, batch):
    inputs, _ = batch
    model = tiny_model()
    plain = plain_states(model, inputs)
    wrapped = nn.DataParallel(lora(tiny_model()))
    for module in wrapped.modules():
        if hasattr(module, "lora_B"):
            nn.init.zeros_(module.lora_B["default"].weight)
    with capture(wrapped, EVERY_LAYER) as states:
        wrapped(**inputs)
    assert all(torch.equal(states[layer], plain[layer]) for layer in EVERY_LAYER)


def test_backward_inside_the_block(tiny_model, batch):
    inputs, rows = batch
    model = tiny_model().train()
    wanted = gradients(
        model, weighted_sum({i: h[rows] for i, h in enumerate(plain_states(model, inputs)) if i})
    )
    for mode in MODES[1:]:
        set_mode(model, mode)
        with capture(model, [1, 2, 3], rows=rows) as states:
            model(**inputs)
            assert_same_gradients(gradients(model, weighted_sum(states)), wanted)
        assert sorted(states) == [1, 2, 3]


def test_nested_captures_of_one_forward(tiny_model, batch):
    inputs, rows = batch
    model = tiny_model()
    plain = plain_states(model, inputs)
    with capture(model, [1, 3]) as outer, capture(model, [0, 1, 3], rows, final_norm=False) as inner:
        model(**inputs)
    assert sorted(outer) == [1, 3] and sorted(inner) == [0, 1, 3]
    assert torch.equal(outer[1], plain[1]) and torch.equal(outer[3], plain[3])
    assert torch.equal(inner[0], plain[0][rows]) and torch.equal(inner[1], plain[1][rows])
    assert torch.equal(model.model.norm(inner[3]), plain[3][rows])


# Checkpointing around the hooks


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x).tanh()


class ReplayedBlock(Block):
    """A block that checkpoints its `__call__`, hooks included, as transformers up to 5.19 does."""

    gradient_checkpointing = False

    def __call__(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(partial(super().__call__, **kwargs), *args)
        return super().__call__(*args, **kwargs)


class Stack(nn.Module):
    """The least that `capture` asks of a model: a config, a list of blocks, a norm at the end."""

    gradient_checkpointing = False
    block = ReplayedBlock

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = PreTrainedConfig(num_hidden_layers=NUM_LAYERS)
        self.embed, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.layers = nn.ModuleList(self.block() for _ in range(NUM_LAYERS))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = self.through(layer, x)
        return self.norm(x)

    def through(self, layer, x):
        return layer(x)


class CheckpointingStack(Stack):
    """A stack that checkpoints its blocks, as models did before transformers had a class for it."""

    block = Block

    def through(self, layer, x):
        return (
            self._gradient_checkpointing_func(layer.__call__, x) if self.gradient_checkpointing else layer(x)
        )


def checkpoint_blocks(model, use_reentrant):
    """As `gradient_checkpointing_enable` does it."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("layers", [[0], [1], [1, 2], EVERY_LAYER], ids=str)
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("stack", [Stack, CheckpointingStack])
def test_hooks_replayed_by_the_backward(stack, with_rows, layers, stop_early, use_reentrant):
    ids = torch.arange(6).reshape(2, 3)
    rows = torch.tensor([[True, False, True], [False, False, True]]) if with_rows else None
    model = stack()
    x = model.embed(ids)
    plain = {0: x}
    for layer, block in enumerate(model.layers, start=1):
        x = block(x)
        plain[layer] = model.norm(x) if layer == NUM_LAYERS else x
    if with_rows:
        plain = {layer: state[rows] for layer, state in plain.items()}
    wanted = gradients(model, weighted_sum({layer: plain[layer] for layer in layers}))

    checkpoint_blocks(model, use_reentrant)
    with capture(model, layers, rows, stop_early=stop_early) as states:
        model(ids)
    assert sorted(states) == layers
    assert all(torch.equal(states[layer], plain[layer]) for layer in layers)
    assert_same_gradients(gradients(model, weighted_sum(states)), wanted)

    with capture(model, layers, rows) as states:
        model(ids)
        assert_same_gradients(gradients(model, weighted_sum(states)), wanted)
    assert sorted(states) == layers


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer, runs", [(1, [1, 0, 0]), (2, [2, 1, 0]), (3, [2, 2, 1])])
def test_a_backward_that_follows_at_once_does_not_run_the_last_block_again(
    tiny_model, layer, runs, use_reentrant
):
    """Where rows are only kept, as for an output loss, all are checkpointed; gradients are the same."""
    model = set_mode(tiny_model(), "checkpointed-reentrant" if use_reentrant else "checkpointed")
    ids, found = torch.arange(8)[None], []
    reading, mask = ModelInput(ids, torch.ones_like(ids), 0, 8), torch.ones(1, 8, dtype=torch.bool)
    for transform in (None, lambda _, states: states):
        counts = count_runs(model)
        request = StateRequest((layer,), mask, transform=transform)
        (states,) = read_states(model, reading, [request], backward_follows=transform is not None)
        found.append(gradients(model, weighted_sum(states)))
        assert counts == (runs if transform else [2 * (i < layer) for i in range(3)])
        assert all(block.gradient_checkpointing for block in blocks(model))
    assert_same_gradients(*found)


def count_runs(model):
    """How often each block has run from here on."""
    counts = [0] * len(blocks(model))
    for i, block in enumerate(blocks(model)):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


def test_checkpointing_that_is_not_hugging_faces_is_refused():
    model = Stack()
    model.layers[0].gradient_checkpointing = True
    with pytest.raises(UserError, match="checkpoints its blocks in a way of its own"), capture(model, [1]):
        pass


@pytest.mark.parametrize("mode", MODES)
def test_rows_get_their_gradient_between_their_blocks(mode, tiny_model, batch):
    """One gradient at full length at a time: not those of all layers before the backward of any block."""
    inputs, rows = batch
    model = tiny_model()
    set_mode(model, mode)
    with capture(model, [1, 2, 3], rows, final_norm=False) as states:
        model(**inputs)
    order = []
    for layer, state in states.items():
        state.register_hook(lambda _, layer=layer: order.append(("rows", layer)))
    for layer, block in enumerate(blocks(model), start=1):
        block.mlp.down_proj.weight.register_hook(lambda _, layer=layer: order.append(("block", layer)))
    weighted_sum(states).backward()
    assert order == [(what, layer) for layer in (3, 2, 1) for what in ("rows", "block")]


# Stopping early


def forbid(module):
    """Make a module fail on being begun: by its forward, and by a hook that was there first."""

    def fail(*_, **__):
        raise AssertionError(f"{type(module).__name__} ran")

    module.forward = fail
    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("layers", "final_norm"),
    [([0], True), ([2], True), ([1, 2], False), ([0, 3], True), ([3], False)],
    ids=str,
)
def test_stop_early_runs_nothing_later(layers, final_norm, mode, tiny_model, batch):
    inputs, rows = batch
    model = tiny_model().train(mode != "eval")
    with capture(model, layers, rows, final_norm) as plain:
        model(**inputs)
    wanted = gradients(model, weighted_sum(plain))

    set_mode(model, mode)
    hooks = [forbid(model.lm_head)]
    for layer in range(max(layers) + 1, NUM_LAYERS + 1):
        block = blocks(model)[layer - 1]
        hooks.append(forbid(block))
        if layer == 1:  # Layer 0 is read at the first block's door: its forward is all that can be spared.
            hooks.pop().remove()
    before = count_hooks(model)
    finished = False
    with capture(model, layers, rows, final_norm, stop_early=True) as states:
        model(**inputs)
        finished = True
    assert not finished
    assert count_hooks(model) == before
    assert sorted(states) == layers
    assert all(torch.equal(states[layer], plain[layer]) for layer in layers)
    assert_same_gradients(gradients(model, weighted_sum(states)), wanted)


def test_stop_early_at_the_last_block_leaves_the_final_norm_out_of_its_state(tiny_model, batch):
    inputs, _ = batch
    model = tiny_model()
    plain = plain_states(model, inputs)
    with capture(model, [3], final_norm=False, stop_early=True) as states:
        model(**inputs)
    assert torch.equal(model.model.norm(states[3]), plain[3])


def test_model_is_whole_after_stopping_early(family, tiny_model, batch):
    inputs, _ = batch
    model = tiny_model(family)
    output = model(**inputs, output_hidden_states=True)
    for layer in EVERY_LAYER:
        with capture(model, [layer], stop_early=True) as states:
            model(**inputs, output_hidden_states=True)
        assert torch.equal(states[layer], output.hidden_states[layer])
    again = model(**inputs, output_hidden_states=True)
    assert torch.equal(again.logits, output.logits)
    assert len(again.hidden_states) == NUM_LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(again.hidden_states, output.hidden_states, strict=True))


# Hooks and errors


@pytest.mark.parametrize("stop_early", [False, True])
def test_hooks_are_removed(stop_early, tiny_model, batch):
    inputs, rows = batch
    model = tiny_model()
    before = count_hooks(model)
    with capture(model, EVERY_LAYER, rows, stop_early=stop_early):
        assert count_hooks(model) != before
        model(**inputs)
    assert count_hooks(model) == before
    with pytest.raises(KeyError, match="mine"), capture(model, EVERY_LAYER, stop_early=stop_early):
        raise KeyError("mine")
    assert count_hooks(model) == before
    with pytest.raises(UserError), capture(model, [0, 9], stop_early=stop_early):
        pass
    assert count_hooks(model) == before


@pytest.mark.parametrize("layers", [[4], [-1], [0, 1, 7], [1, 1], [0, 2, 0], []], ids=str)
def test_bad_layers_are_refused(layers, tiny_model):
    with pytest.raises(UserError, match="layer"), capture(tiny_model(), layers):
        pass


@pytest.mark.parametrize("shape", [(3, 6), (2, 7), (3, 8), (7, 3), (21,), (3, 7, 1)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_another_shape_are_refused(mode, shape, tiny_model, batch):
    inputs, _ = batch
    model = set_mode(tiny_model(), mode)
    before = count_hooks(model)
    rows = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(UserError, match="rows has shape"), capture(model, [2], rows):
        model(**inputs)
    assert count_hooks(model) == before


@pytest.mark.parametrize("stop_early", [False, True])
def test_no_forward_is_an_error(stop_early, tiny_model):
    model = tiny_model()
    before = count_hooks(model)
    with pytest.raises(RuntimeError, match="did not run"), capture(model, [1, 2], stop_early=stop_early):
        pass
    assert count_hooks(model) == before


@pytest.mark.parametrize("layers", [[0], [1], [3]], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_two_forwards_are_an_error(mode, layers, tiny_model, batch):
    inputs, _ = batch
    model = set_mode(tiny_model(), mode)
    before = count_hooks(model)
    with pytest.raises(RuntimeError, match="ran twice"), capture(model, layers):
        model(**inputs)
        model(**inputs)
    assert count_hooks(model) == before


def test_num_layers(family, tiny_model):
    model = tiny_model(family)
    assert num_layers(model) == NUM_LAYERS == model.config.num_hidden_layers
    assert num_layers(nn.DataParallel(model)) == NUM_LAYERS


def test_blocks_below_an_adapter(tiny_model):
    model = tiny_model()
    sequence = blocks(model)
    assert blocks(lora(model)) is sequence


def test_a_model_without_a_stack_of_blocks_is_refused():
    config = BertConfig(
        vocab_size=9, hidden_size=4, num_hidden_layers=2, num_attention_heads=1, intermediate_size=4
    )
    with pytest.raises(UserError, match="blocks of BertModel"), capture(BertModel(config), [1]):
        pass
