"""The share of a rollout's n-grams that are new, against sets of tuples."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.rollouts.repetition import distinct_share


@given(st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=4), st.integers(1, 5))
def test_distinct_over_all(rollouts, n):
    width = max(map(len, rollouts))
    ids = torch.tensor([row + [9] * (width - len(row)) for row in rollouts]).reshape(len(rollouts), width)
    mask = (
        torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rollouts])
        .reshape(ids.shape)
        .long()
    )
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rollouts if len(row) >= n]
    expected = [len(set(each)) / len(each) for each in grams]
    torch.testing.assert_close(distinct_share(ids, mask, n), torch.tensor(expected))
