"""Rollouts that are given, windows cut in parts, and updates compared with one another."""

import pytest
import torch

LENGTHS = (5, 1, 8, 3)


def scripted(prompt_ids):
    """A completion that depends on the prompt alone; 8 tokens are the limit, and shorter ones end in EOS."""
    generator = torch.Generator().manual_seed(sum(prompt_ids))
    length = LENGTHS[(sum(prompt_ids) + len(prompt_ids)) % 4]
    ids = torch.randint(10, 17, (length,), generator=generator).tolist()  # no multiple of nine: none ends it
    return ids if length == 8 else [*ids[:-1], 2]


def pieces(batch, splits):
    return [
        {key: value[rows] if value.ndim else value for key, value in batch.items()}
        for rows in (torch.tensor(split) for split in splits)
    ]


def close(one, other, tolerance=1e-6):
    (value_1, gradient_1), (value_2, gradient_2) = one, other
    assert value_1 == pytest.approx(value_2, rel=tolerance)
    assert gradient_1.norm() > 0
    assert (gradient_1 - gradient_2).norm() <= tolerance * gradient_1.norm()


def agree(trainer, gradient, batch, expected):
    """Compare value and gradient of the trainer's loss with the hand-made one."""
    value, given = gradient(trainer, batch)
    trainer.model.zero_grad()
    expected.backward()
    wanted = torch.cat(
        [
            (p.grad if p.grad is not None else torch.zeros_like(p)).double().flatten()
            for p in trainer.model.parameters()
        ]
    )
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert wanted.norm() > 0
    assert (given - wanted).norm() <= 2e-5 * wanted.norm()
