"""A run with the loss of transitions: by hand on uneven rollouts, whatever the micro-batches."""

from itertools import pairwise

import pytest
import torch

import by_hand
from random_bridge import save_random_bridge
from updates import agree, close, pieces


def phf(s, t, rows):
    """The values of a rollout's transitions between neighbouring rows of `rows`."""
    pairs = [(a, b) for a, b in pairwise(rows) if b == a + 1]
    ours, theirs = ([(x[b] - x[a]) / (x[b] - x[a]).norm() for a, b in pairs] for x in (s, t))
    return [
        1 - d @ e + sum((d @ f - e @ g) ** 2 for f, g in zip(ours, theirs, strict=True)) / len(pairs)
        for d, e in zip(ours, theirs, strict=True)
    ]


def test_transitions_of_uneven_rollouts(make_trainer, roll_out, gradient):
    trainer = make_trainer(representation_loss="phf", positions="last=5")
    batch, per_layer = roll_out(trainer), []
    given = by_hand.rollouts(batch)
    for layer in (1, 2):
        means = []
        for prompt, completion, supervised in given:
            s, t = (
                by_hand.states_and_logits(model, prompt, completion)[0][layer]
                for model in (trainer.model, trainer.teacher.model)
            )
            values = phf(s, t.detach(), by_hand.chosen(supervised, "last=5"))
            means.append(torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64))
        per_layer.append(torch.stack(means).mean())
    agree(trainer, gradient, batch, torch.stack(per_layer).mean())
    assert min(len(completion) for _, completion, _ in given) < 5
    for model in (trainer.model, trainer.teacher.model):
        model.double()
    close(
        gradient(trainer, batch), gradient(trainer, *pieces(batch, [[3, 1], [0, 4, 5], [2]])), tolerance=1e-10
    )


def test_through_a_bridge(make_trainer, make_folder, student, roll_out, gradient, tmp_path):
    wide = make_folder(2, num_hidden_layers=5, hidden_size=48)
    bridge = save_random_bridge(tmp_path, student, wide, pairs=((1, 2), (2, 5)))
    trainer = make_trainer(teacher=wide, bridge=bridge, representation_loss="phf", positions="all")
    value, given = gradient(trainer, roll_out(trainer))
    assert value > 0 and given.norm() > 0


@pytest.mark.parametrize("keys", [{"row_weights": "gap"}, {"teacher_extrapolation": 1.25}], ids=str)
def test_beside_what_else_changes_the_loss(make_trainer, roll_out, gradient, keys):
    trainer = make_trainer(representation_loss="phf", positions="all", **keys)
    value, given = gradient(trainer, roll_out(trainer))
    assert value > 0 and given.isfinite().all()
