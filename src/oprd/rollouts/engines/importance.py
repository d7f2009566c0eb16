"""Truncated importance weights: rollouts come from the engine's policy, and gradients are the trainer's."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from oprd.foundation.errors import UserError

# Sampling from the policy as it is; anything else cuts, rescales or penalises it.
PLAIN_SAMPLING = {
    "temperature": (1,),
    "top_p": (1,),
    "top_k": (0,),
    "min_p": (None, 0),
    "repetition_penalty": (1,),
}


@torch.no_grad()
def importance_weights(
    log_probs: Float[Tensor, " N"], engine_log_probs: Float[Tensor, " N"], cap: float
) -> Float[Tensor, " N"]:
    """min(π_trainer / π_engine, cap) of the sampled tokens, from their log-probs; no gradient passes."""
    return (log_probs - engine_log_probs).exp().clamp(max=cap)


def check_correction(config: Any) -> None:
    """Raise `UserError` for a training config whose rollouts the weights could not correct."""
    name = "vllm_importance_sampling_correction"
    if not config.use_vllm:
        raise UserError(
            f"{name} weighs vLLM's rollouts, and use_vllm is false: set use_vllm: true, or drop it"
        )
    if config.output_loss != "sampled_token":
        raise UserError(
            f"{name} belongs to output_loss: sampled_token, and output_loss is {config.output_loss}, which "
            "is no expectation over the sampled tokens: drop it"
        )
    key = altered_sampling(config)
    if key is not None:
        raise UserError(
            f"{name} needs rollouts of the policy itself, and {key} is {getattr(config, key)}: leave "
            f"{', '.join(PLAIN_SAMPLING)} at their defaults, or drop it"
        )


def altered_sampling(config: Any) -> str | None:
    """The first key by which a training config samples from another distribution than the policy's."""
    return next((key for key, plain in PLAIN_SAMPLING.items() if getattr(config, key) not in plain), None)
