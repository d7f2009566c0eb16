"""Rollouts of similar length in one micro-batch, under a budget of tokens: less padding, the same result.

Every row's weight is fixed before (`rows.weigh_rows`), so how rollouts are grouped does not change the loss.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from oprd.rollouts.rows import RolloutInputs

GROUP_COST = 1 / 32  # of the budget: what starting one more micro-batch is worth in padded tokens


def micro_batches(prompts: Sequence[int], responses: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rollouts, longest first, in groups whose padded tokens stay within `budget`.

    `prompts` and `responses` are lengths in tokens; a group is padded to the longest of each. A rollout that
    is longer than the budget is a group of its own. Of all ways to cut the rollouts, in order of length, the
    one of least cost: padded tokens, and for every group `GROUP_COST` of the budget.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-prompts[i] - responses[i], i))
    best, cuts = [0.0], [0]
    for end in range(1, len(order) + 1):
        costs, prompt, response = [], 0, 0
        for start in reversed(range(end)):
            prompt = max(prompt, prompts[order[start]])
            response = max(response, responses[order[start]])
            padded = (end - start) * (prompt + response)
            if padded > budget and end - start > 1:
                break
            costs.append((best[start] + padded + GROUP_COST * budget, start))
        cost, cut = min(costs)
        best.append(cost)
        cuts.append(cut)
    groups, end = [], len(order)
    while end:
        groups.append(order[cuts[end] : end])
        end = cuts[end]
    return groups[::-1]


def repack(
    window: Sequence[RolloutInputs], budget: int, most: Callable[[int], int] = lambda count: count
) -> list[list[RolloutInputs]]:
    """The micro-batches of an accumulation window as many lists of new ones, which hold the same rollouts.

    `most` is the largest of the counts of all ranks, which run equally many, if need be on rows of weight
    zero. The last list is never empty: its backward is the one that ranks wait for.
    """
    tensors = cast(Sequence[dict[str, Tensor]], window)
    whole = {
        name: torch.cat([inputs[name] for inputs in tensors]) if value.ndim else value
        for name, value in tensors[0].items()
        if value is not None
    }
    prompts, responses = (whole[f"{part}_mask"].sum(-1).tolist() for part in ("prompt", "completion"))
    parts = [
        {name: value[torch.tensor(group)] if value.ndim else value for name, value in whole.items()}
        for group in micro_batches(prompts, responses, budget)
    ]
    idle = {name: value[-1:] if value.ndim else value for name, value in parts[-1].items()}
    idle |= {name: torch.zeros_like(value) for name, value in idle.items() if name.endswith("_weights")}
    parts += [idle] * (most(len(parts)) - len(parts))
    packed = cast(list[RolloutInputs], parts)
    return [packed[i :: len(window)] for i in reversed(range(len(window)))]
