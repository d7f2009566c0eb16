"""Weights and logits that are not finite: found, named, and not sampled from."""

import pytest
import torch
from torch import nn

from oprd.foundation.errors import UserError
from oprd.models.finite import check_loaded, check_trained, finite_logits


def model(dtype=torch.float32):
    layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    layers.register_parameter("none", nn.Parameter(torch.empty(0)))
    return layers.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_parameter_that_is_not_finite_is_named(dtype, value):
    here = model(dtype)
    with torch.no_grad():
        here[2].bias.fill_(torch.finfo(dtype).max)
    check_loaded(here, "the teacher")
    check_trained(here, 3)
    with torch.no_grad():
        here[2].weight[1, 3] = value
        here[2].bias[0] = value
    with pytest.raises(UserError, match=r"the weights of the teacher are not finite: 2\.weight"):
        check_loaded(here, "the teacher")
    with pytest.raises(RuntimeError, match=r"step 3: the student's weights are not finite \(2\.weight"):
        check_trained(here, 3)


def test_weights_that_are_elsewhere_or_quantised_are_passed_over():
    here = model()
    here.register_parameter("codes", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    here.register_parameter("elsewhere", nn.Parameter(torch.zeros(2, device="meta")))
    check_loaded(here, "the teacher")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_the_forward(tiny_model, value):
    here = tiny_model("qwen3")
    ids = torch.tensor([[5, 6, 7]])
    with finite_logits(here, "step 2: the student"):
        here(input_ids=ids)
    with torch.no_grad():
        here.lm_head.weight[9] = value
    with (
        pytest.raises(RuntimeError, match=r"step 2: the student's logits are not finite \(.*lm_head\.weight"),
        finite_logits(here, "step 2: the student"),
    ):
        here(input_ids=ids)
    here(input_ids=ids)  # watched within the block alone


def test_a_token_that_is_ruled_out_is_no_fault(tiny_model):
    here = tiny_model("qwen3")
    here.lm_head.register_forward_hook(lambda *given: given[-1].index_fill(-1, torch.tensor([3]), -torch.inf))
    with finite_logits(here, "the model"):
        assert here(input_ids=torch.tensor([[5]])).logits[0, 0, 3] == -torch.inf
