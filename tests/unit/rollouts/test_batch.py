"""From padded rollouts to what both models read: rows, positions, weights."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from oprd.foundation.errors import UserError
from oprd.models.forward import ModelInput, StateRequest, read_states
from oprd.models.packed import mixing
from oprd.models.padding import heeds_padding
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.rows import RolloutBatch, weigh_rows

PROMPTS = [[5, 6, 7, 8], [9, 4], [3, 3, 8]]
COMPLETIONS = [[10, 11], [12, 13, 14, 15, 16], [17]]


def padded(prompts, completions, left=0, right=0, filler=0):
    """Left-padded prompts and right-padded completions with extra columns of padding."""
    width, length = max(map(len, prompts)) + left, max(map(len, completions)) + right
    tensors = {
        "prompt_ids": [[filler] * (width - len(p)) + p for p in prompts],
        "prompt_mask": [[0] * (width - len(p)) + [1] * len(p) for p in prompts],
        "completion_ids": [c + [filler] * (length - len(c)) for c in completions],
        "completion_mask": [[1] * len(c) + [0] * (length - len(c)) for c in completions],
    }
    return {name: torch.tensor(value) for name, value in tensors.items()}


def one_each(inputs):
    return ModelInput.of(*(inputs[f"{a}_{b}"] for a in ("prompt", "completion") for b in ("ids", "mask")))


@pytest.mark.parametrize(("left", "right"), [(0, 0), (3, 0), (0, 2), (2, 4)])
def test_reading_drops_columns_that_are_padding_throughout(left, right):
    reading = one_each(padded(PROMPTS, COMPLETIONS, left, right))
    # The last token of the longest completion is predicted, but not read.
    assert reading.input_ids.tolist() == [
        [5, 6, 7, 8, 10, 11, 0, 0],
        [0, 0, 9, 4, 12, 13, 14, 15],
        [0, 3, 3, 8, 17, 0, 0, 0],
    ]
    assert reading.attention_mask.tolist() == [
        [1, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert (reading.first_row, reading.num_rows) == (3, 5)


def test_rows_start_at_the_last_prompt_token():
    inputs = padded(PROMPTS, COMPLETIONS, 2, 3)
    reading = one_each(inputs)
    placed = reading.rows(inputs["completion_mask"].bool())
    assert placed.tolist() == [
        [False] * 3 + [True] * 2 + [False] * 3,
        [False] * 3 + [True] * 5,
        [False] * 3 + [True] + [False] * 4,
    ]
    # What a row has read last: the prompt's end, then all response tokens but the last.
    assert reading.input_ids[placed].tolist() == [8, 10, 4, 12, 13, 14, 15, 8]


@pytest.mark.parametrize("completions", [[[10], [11], [12]], [[10], [], [11, 12]]])
def test_short_completions(completions):
    inputs = padded(PROMPTS, completions, right=1)
    reading = one_each(inputs)
    longest = max(map(len, completions))
    assert reading.input_ids.shape == (3, 4 + longest - 1)
    assert int(reading.rows(inputs["completion_mask"].bool()).sum()) == sum(map(len, completions))


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2"])
def test_states_of_a_padded_batch_are_those_of_each_sequence(tiny_model, architecture, padding_free):
    """Learned positions (gpt2) too: they count real tokens, so left padding does not shift them."""
    model = tiny_model(architecture)
    inputs = padded(PROMPTS, COMPLETIONS, 3, 2, filler=39)
    mask = inputs["completion_mask"].bool()
    sparse = mask & (torch.arange(mask.shape[1]) % 2 == 0)
    reading = one_each(inputs)
    with torch.no_grad():
        requests = [
            StateRequest((1, 3), mask),
            StateRequest((2,), sparse),
            StateRequest((0, 3), mask, final_norm=False),
        ]
        given = read_states(model, reading, requests, padding_free)
    assert [sorted(states) for states in given] == [[1, 3], [2], [0, 3]]
    alone: dict[int, list[torch.Tensor]] = {layer: [] for layer in range(4)}
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([prompt + completion]), output_hidden_states=True
            ).hidden_states
        for layer in alone:
            alone[layer].append(states[layer][0, len(prompt) - 1 : -1])
    wanted = {layer: torch.cat(rows) for layer, rows in alone.items()}
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(given[0][1], wanted[1], **close)
    torch.testing.assert_close(given[0][3], wanted[3], **close)
    torch.testing.assert_close(given[1][2], wanted[2][sparse[mask]], **close)
    torch.testing.assert_close(given[2][0], wanted[0], **close)
    norm = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
    torch.testing.assert_close(norm(given[2][3]), wanted[3], **close)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_without_padding_the_gradient_is_that_of_padded_rollouts(tiny_model, family, checkpointing):
    """Under a block-diagonal mask; flash attention takes the lengths instead."""
    if family == "qwen3_moe":
        pytest.skip("experts are weighed among the tokens of a batch")
    inputs = padded(PROMPTS, COMPLETIONS, 3, 2, filler=39)
    mask, shapes, gradients = inputs["completion_mask"].bool(), [], []
    for padding_free in (False, True):
        model = tiny_model(family).train()
        if model.config._attn_implementation == "sdpa":  # eager attention overflows in float64
            model = model.double()
        if checkpointing:
            model.gradient_checkpointing_enable()
        heeds_padding(model)  # tried before forwards are counted
        model.get_input_embeddings().register_forward_hook(lambda m, a, out: shapes.append(out.shape))
        requests = [StateRequest((1, 3), mask), StateRequest((2,), mask)]
        states = read_states(model, one_each(inputs), requests, padding_free)
        weights = torch.linspace(-1, 1, int(mask.sum()))
        sum((weights[:, None] * x).pow(2).sum() for one in states for x in one.values()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert shapes[1][:2] == (1, one_each(inputs).attention_mask.sum()) and shapes[0][0] == len(PROMPTS)
    assert (gradients[0] - gradients[1]).norm() <= 1e-6 * gradients[0].norm()


@pytest.mark.parametrize("first", [(3,), (1,), (1, 2)])
@pytest.mark.parametrize("second", [(3,), (2,), (1, 3)])
def test_any_two_wants_are_served_by_one_forward(tiny_model, first, second):
    model = tiny_model("qwen3")
    inputs = padded(PROMPTS, COMPLETIONS)
    mask = inputs["completion_mask"].bool()
    count = []
    heeds_padding(model)  # tried before forwards are counted
    model.model.register_forward_pre_hook(lambda *_: count.append(1))
    with torch.no_grad():
        one, two = read_states(
            model, one_each(inputs), [StateRequest(first, mask), StateRequest(second, mask)]
        )
    assert (sorted(one), sorted(two), len(count)) == (sorted(first), sorted(second), 1)
    for layer in set(first) & set(second):
        assert torch.equal(one[layer], two[layer])


def sums(value):
    return value


@pytest.mark.parametrize(
    ("settings", "representation", "output"),
    [
        ({"positions": "all"}, [2, 5, 1], [2, 5, 1]),
        ({"positions": "last=2", "output_positions": "first=3"}, [2, 2, 1], [2, 3, 1]),
        ({"positions": "all", "mask_truncated_completions": True}, [2, 0, 1], [2, 0, 1]),
    ],
    ids=str,
)
def test_weigh_rows(settings, representation, output):
    inputs = padded(PROMPTS, COMPLETIONS, right=2)
    weights = weigh_rows(inputs, torch.tensor([False, True, False]), ObjectiveSettings(**settings), sums)
    for term, rows in (("representation", representation), ("output", output)):
        given = weights[f"{term}_weights"]
        assert (given > 0).sum(-1).tolist() == rows
        filled = sum(count > 0 for count in rows)
        assert given.sum(-1).tolist() == pytest.approx([(count > 0) / filled for count in rows])


def test_tool_tokens_are_not_supervised_and_do_not_count():
    inputs = padded(PROMPTS, COMPLETIONS)
    inputs["tool_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    truncated = torch.zeros(3, dtype=torch.bool)
    weights = weigh_rows(inputs, truncated, ObjectiveSettings(positions="last=2", reduction="token"), sums)
    assert (weights["representation_weights"] > 0).int().tolist() == [
        [1, 1, 0, 0, 0],
        [0, 1, 0, 0, 1],
        [1, 0, 0, 0, 0],
    ]
    assert (weights["output_weights"] > 0).sum(-1).tolist() == [2, 3, 1]


def test_counts_come_from_all_ranks():
    inputs = padded(PROMPTS, COMPLETIONS)
    truncated = torch.zeros(3, dtype=torch.bool)
    weights = weigh_rows(inputs, truncated, ObjectiveSettings(), lambda units: units + 9)
    assert weights["representation_weights"].sum().item() == pytest.approx(3 / 12)


def test_batch_pairs_the_response_rows_of_two_prompts():
    inputs = padded(PROMPTS, COMPLETIONS)
    weights = {f"{term}_weights": inputs["completion_mask"].float() for term in ("representation", "output")}
    batch = RolloutBatch.of(inputs | weights)
    assert batch.teacher is batch.student
    other = padded([[1] * 7, [2], [3] * 4], COMPLETIONS)
    batch = RolloutBatch.of(
        inputs | weights | {f"teacher_{name}": other[name] for name in ("prompt_ids", "prompt_mask")}
    )
    mask = inputs["completion_mask"].bool()
    assert batch.student.input_ids[batch.student.rows(mask)].tolist() == [8, 10, 4, 12, 13, 14, 15, 8]
    assert batch.teacher.input_ids[batch.teacher.rows(mask)].tolist() == [1, 10, 2, 12, 13, 14, 15, 3]
    assert torch.equal(batch.tokens, inputs["completion_ids"])


def test_recurrent_layers_are_read_with_padding():
    """A state that runs along the sequence would leak from one rollout into the next."""
    config = Qwen3NextConfig(
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=0,
    )
    model = Qwen3NextForCausalLM(config).eval()
    assert "linear_attention" in config.layer_types
    inputs = padded(PROMPTS, COMPLETIONS)
    with pytest.raises(UserError, match="carries states from one rollout to the next"):
        read_states(model, one_each(inputs), [StateRequest((2,), inputs["completion_mask"].bool())], True)


def test_a_mask_that_ignores_positions_is_not_trusted():
    """OPT's mask is made of the padding alone, and would let one rollout see another."""
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "vocab_size": 41}
    model = OPTForCausalLM(OPTConfig(num_hidden_layers=2, word_embed_proj_dim=16, **sizes)).eval()
    inputs = padded(PROMPTS, COMPLETIONS)
    requests = [StateRequest((2,), inputs["completion_mask"].bool())]
    with pytest.raises(UserError, match="lets one rollout see another"):
        read_states(model, one_each(inputs), requests, True)
    with torch.no_grad():
        (padded_states,) = read_states(model, one_each(inputs), requests)
    assert len(padded_states[2]) == int(inputs["completion_mask"].sum())


SIZES = {
    **{"vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
}
NARROW = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
APART = {
    **{"llama": {}, "gemma3_text": {"sliding_window": 4}, "llama4_text": {"intermediate_size_mlp": 48}},
    **{"gpt2": NARROW, "ctrl": NARROW | {"dff": 48}, "gpt_neox": {}, "phi3": {}},
}
MIXING = {
    **{"bloom": {"n_layer": 3, "n_head": 4}, "xglm": {"d_model": 32, "ffn_dim": 48}},
    **{"openai-gpt": NARROW, "gpt_oss": {"num_local_experts": 4}, "mamba": {"state_size": 8}},
}


def architecture(kind, **keys):
    torch.manual_seed(0)
    sizes = SIZES | (APART | MIXING)[kind] | keys
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


@pytest.mark.parametrize("kind", [*APART, *MIXING])
def test_what_is_found_of_a_model_is_how_it_behaves(kind):
    model = architecture(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first, second = torch.arange(3, 12)[None], torch.arange(20, 28)[None]
    positions = torch.cat([torch.arange(9), torch.arange(8)])[None]
    with torch.no_grad():
        one = torch.cat([first, second], dim=1)
        together = model(input_ids=one, position_ids=positions, use_cache=False).logits[:, 9:]
        alone = model(input_ids=second, position_ids=positions[:, 9:], use_cache=False).logits
    is_apart = torch.allclose(together, alone, rtol=1e-4, atol=1e-4)
    assert (mixing(model) is None) is is_apart is (kind in APART)


@pytest.mark.parametrize("kind", [*APART, *MIXING])
def test_it_is_found_without_weights_too(kind):
    found = mixing(architecture(kind))
    with torch.device("meta"):
        assert mixing(architecture(kind)) == found
    with FakeTensorMode():
        assert mixing(architecture(kind)) == found


def test_asking_draws_no_random_number():
    model, state = architecture("llama"), torch.random.get_rng_state()
    assert mixing(model) is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_stack_that_cannot_be_tried_is_not_trusted():
    model = architecture("llama")
    own = type(model.model)
    model.model.__class__ = type("Own", (own,), {"__init__": lambda self, config, what: None})
    assert mixing(model) == "lets one rollout see another"
