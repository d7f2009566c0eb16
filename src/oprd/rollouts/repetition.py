"""How much of a rollout is new: a student that is losing its language repeats itself."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

FACTOR = 6364136223846793005  # of a hash of token ids that wraps around 64 bits


def distinct_share(ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], n: int = 4) -> Float[Tensor, " R"]:
    """Of every rollout of at least n tokens, distinct n-grams over all its n-grams."""
    shares = []
    for row, length in zip(ids.long(), mask.sum(-1).tolist(), strict=True):
        tokens = row[:length]
        if length >= n:
            grams = tokens.new_zeros(length - n + 1)
            for place in range(n):
                grams = grams * FACTOR + tokens[place : length - n + 1 + place]
            shares.append(len(grams.unique()) / len(grams))
    return torch.tensor(shares)
