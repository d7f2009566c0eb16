"""Targets beyond the teacher, away from the model that it was trained from (RIDE, arXiv 2609.36484)."""

import torch
from jaxtyping import Float
from torch import Tensor

Values = Float[Tensor, "*shape"]


def extrapolate(teacher: Values, reference: Values, factor: float) -> Values:
    """x_T + (λ − 1)(x_T − x_B) for the `factor` λ, in float32 or wider; λ = 1 is the teacher.

    Of hidden states it is RIDE's target h*. Of log-probabilities it is the reward of RIDE's counterpart in
    output space, log q + (λ − 1)(log q − log q_B).
    """
    wide = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
    return wide + (factor - 1) * (wide - reference.to(wide))
