"""What benchmarks/gap.py says of two models, and of gradients whose mean and noise are known."""

import sys

import pytest
import torch

from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import gap


def test_signal_is_the_mean_over_the_noise():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((10_000,), 0.3)
    drawn = [mean + torch.randn(10_000, generator=generator) for _ in range(50)]
    assert gap.signal(drawn) == pytest.approx(0.3, rel=0.02)
    assert gap.signal([torch.tensor([1.0]), torch.tensor([-1.0])]) == 0


def test_shares_of_layers_and_dimensions():
    student = {1: torch.zeros(2, 16), 2: torch.zeros(2, 16)}
    teacher = {1: torch.ones(2, 16), 2: torch.ones(2, 16)}
    teacher[2][:, 3] = 7.0
    found = gap.layers(student, teacher)
    assert found[1]["share_of_loss"] == pytest.approx(16 / (16 + 15 + 49))
    assert found[1]["share_of_largest_dimensions"] == pytest.approx(0.5)
    assert found[2]["share_of_largest_dimensions"] == pytest.approx((49 + 7) / (49 + 15))


def test_profiles_count_from_both_ends_of_each_rollout():
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    teacher = {1: along.repeat(5, 1)}
    student = {1: torch.stack([along, across, across, along, across])}  # rollouts of three and two rows
    assert gap.profile(student, teacher, [3, 2]) == [
        {"k": 1, "first": 1.0, "last": 0.0},
        {"k": 2, "first": 0.5, "last": 0.25},
    ]


def test_the_bundled_pair():
    found = gap.measure("tiny:student", "tiny:teacher", rollouts=8, batch=4, tokens=16)
    assert sum(layer["share_of_loss"] for layer in found["layers"].values()) == pytest.approx(1)
    assert all(0 < layer["cosine"] < 1 for layer in found["layers"].values())
    assert set(found["signal"]) == set(gap.OBJECTIVES)
    assert found["signal"]["mse"] > 0
