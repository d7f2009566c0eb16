"""A few tokens through a model before the first rollout, to find one whose states cannot be read."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from oprd.foundation.errors import UserError, reason, whatever_fails_is
from oprd.models.capture import backbone, capture
from oprd.models.checks import num_embeddings
from oprd.models.loading import eval_mode, weights_are_here

NUM_TOKENS = 6
SAME = 0.05  # of the largest state: rounding is far below, another text far above


def told_of_architecture(role: str, model: nn.Module) -> AbstractContextManager[None]:
    """Inside it, any error of a model of an unknown architecture is a `UserError` that names the model."""
    return whatever_fails_is(
        lambda error: f"{_named(role, model)} is not built as oprd reads models: {reason(error)}"
    )


@torch.no_grad()
def try_states(role: str, model: Any, layers: Sequence[int], final_norm: bool = True) -> None:
    """Capture the states of `layers` as updates do, on two made-up texts that differ in their last token.

    Raises `UserError` where they are not one vector for each token, or depend on what comes after it.
    Does nothing where this process has not got the weights.
    """
    if not layers or not weights_are_here(model):
        return
    with told_of_architecture(role, model), eval_mode(model):
        if getattr(model.config, "is_encoder_decoder", False):
            raise UserError(f"{_named(role, model)} has an encoder: use a decoder-only causal language model")
        ids = texts(model)
        with capture(model, layers, final_norm=final_norm) as states:
            backbone(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        for layer, state in states.items():
            _check(f"{_named(role, model)}, layer {layer},", state)


def texts(model: Any) -> torch.Tensor:
    """Two texts of a few tokens that differ in the last, where the model has its embeddings."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(NUM_TOKENS).repeat(2, 1)
    ids[1, -1] += 1
    ids = ids % num_embeddings(model)
    return ids if device.type == "meta" else ids.to(device)  # of an offloaded one hooks bring both together


def _check(what: str, state: torch.Tensor) -> None:
    if state.ndim != 3 or tuple(state.shape[:2]) != (2, NUM_TOKENS):
        raise UserError(
            f"{what} gives states of shape {list(state.shape)} for 2 texts of {NUM_TOKENS} tokens, and oprd "
            "compares one vector for each token: choose other layers, or representation_weight: 0"
        )
    first, second = state[:, :-1].float()
    if (first - second).abs().max() > SAME * first.abs().max():
        raise UserError(
            f"{what} gives states that depend on later tokens: use a causal language model, in which a token "
            "sees what is before it"
        )


def _named(role: str, model: Any) -> str:
    name = getattr(model.config, "name_or_path", "")
    return f"the {role} {name} ({type(model).__name__})" if name else f"the {role} ({type(model).__name__})"
