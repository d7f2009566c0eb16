"""Rollouts grouped by length under a budget of tokens."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd.rollouts.packing import micro_batches, repack
from oprd.rollouts.rows import RolloutBatch

LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=9)


def padded(group):
    """Tokens of rollouts, as (prompt, response), padded to the longest prompt and the longest response."""
    return len(group) * (max(prompt for prompt, _ in group) + max(response for _, response in group))


def least_cost(lengths, budget):
    """Padded tokens and a 32nd of the budget per group, by trying every way to cut the rollouts in order."""
    order, costs = sorted(lengths, key=sum, reverse=True), []
    for chosen in range(2 ** (len(order) - 1)):
        edges = [0, *(i + 1 for i in range(len(order) - 1) if chosen >> i & 1), len(order)]
        groups = [order[a:b] for a, b in pairwise(edges)]
        if all(len(group) == 1 or padded(group) <= budget for group in groups):
            costs.append(sum(padded(group) + budget / 32 for group in groups))
    return min(costs)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 120))
def test_groups(lengths, budget):
    groups = micro_batches(*zip(*lengths, strict=True), budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    sizes = [[lengths[i] for i in group] for group in groups]
    assert all(len(group) == 1 or padded(group) <= budget for group in sizes)
    totals = [sum(pair) for group in sizes for pair in group]
    assert totals == sorted(totals, reverse=True)
    cost = sum(padded(group) + budget / 32 for group in sizes)
    assert cost == pytest.approx(least_cost(lengths, budget))


def test_a_long_prompt_and_a_long_response_do_not_share_a_micro_batch():
    assert micro_batches([30, 2], [2, 30], 64) == [[0], [1]]
    assert micro_batches([30, 29], [2, 3], 70) == [[0, 1]]


def test_long_tails_need_less_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = (1000 * torch.randn(64, generator=generator).mul(0.8).exp()).int().clamp(min=1).tolist()
    fixed = sum(4 * max(lengths[i : i + 4]) for i in range(0, 64, 4))
    budget = 4 * max(lengths)
    groups = micro_batches([0] * 64, lengths, budget)
    packed = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert sum(lengths) <= packed < 1.1 * sum(lengths) < 0.6 * fixed


@pytest.mark.parametrize("budget", [1, 12, 20, 1000])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_window_keeps_its_rollouts(budget, accumulation):
    lengths = torch.tensor([3, 9, 1, 4, 4, 7])
    mask = torch.arange(9) < lengths[:, None]
    prompt = torch.arange(5) >= torch.tensor([1, 0, 4, 2, 3, 0])[:, None]
    whole = {
        "prompt_mask": prompt.long(),
        "completion_mask": mask.long(),
        "prompt_ids": torch.zeros(6, 5, dtype=torch.long),
        "completion_ids": torch.arange(54).reshape(6, 9),
        "representation_weights": mask / 28,
        "output_weights": mask / 28,
        "num_items_in_batch": torch.tensor(28),
        "nothing": None,
    }
    size = 6 // accumulation
    window = [
        {k: v if v is None or not v.ndim else v[i * size : (i + 1) * size] for k, v in whole.items()}
        for i in range(accumulation)
    ]
    lists = repack(window, budget)
    assert len(lists) == accumulation and lists[-1]
    parts = [part for group in lists for part in group]
    ids = torch.cat([part["completion_ids"] for part in parts])
    assert sorted(ids[:, 0].tolist()) == list(range(0, 54, 9))
    for part in parts:
        rows = part["completion_ids"][:, 0] // 9
        assert torch.equal(part["completion_mask"], whole["completion_mask"][rows])
        assert torch.equal(part["prompt_mask"], whole["prompt_mask"][rows])
        assert part["num_items_in_batch"] == 28 and "nothing" not in part
        assert len(rows) == 1 or RolloutBatch.of(part).student.input_ids.numel() <= budget


def test_ranks_run_equally_many_micro_batches():
    lengths = torch.tensor([5, 3, 2, 1])
    mask = (torch.arange(5) < lengths[:, None]).long()
    window = [
        {
            "prompt_mask": torch.ones(4, 1, dtype=torch.long),
            "completion_ids": torch.arange(20).view(4, 5),
            "completion_mask": mask,
            "representation_weights": mask / 4,
        }
    ]
    (own,), (padded,) = repack(window, 6), repack(window, 6, lambda count: count + 2)
    assert len(padded) == len(own) + 2
    for one, other in zip(own, padded, strict=False):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for idle in padded[len(own) :]:
        assert idle["completion_mask"].sum() == 1 and not idle["representation_weights"].any()
