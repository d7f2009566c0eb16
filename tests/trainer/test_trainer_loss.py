"""The trainer's loss on given rollouts against one written out by hand, value and gradient."""

import pytest
import torch

import by_hand
from oprd.foundation.errors import UserError
from oprd.objective.losses import REPRESENTATION_LOSSES
from updates import agree

PAIRS = {"all": [(1, 1), (2, 2)], "last": [(2, 2)], "1": [(1, 1)], "1=2": [(1, 2)]}
TOP_K = [
    {"output_loss": name, "output_top_k": 4, "output_support": support}
    for name in ("top_k", "top_k_authors")
    for support in ("student", "teacher", "union", "intersection")
]
TRUNCATED = [
    {"output_loss": "top_k", "output_top_k": 3, "renormalize": False},
    {"output_loss": "top_k", "output_top_k": 1, "renormalize": False},
]
FULL = [{"output_loss": "full_vocab", "divergence": d} for d in ("reverse_kl", "forward_kl", "jsd")]
WARM = [
    {"output_loss": "full_vocab", "student_temperature": 0.7, "teacher_temperature": 1.5},
    {"output_loss": "sampled_token", "student_temperature": 2.0},
    {"output_loss": "sampled_token", "output_baseline": "kl", "teacher_temperature": 1.5},
]
SAMPLED = [{"output_loss": "sampled_token"}, {"output_loss": "sampled_token", "output_baseline": "kl"}]
COLD = [*SAMPLED, *TOP_K, *TRUNCATED, *FULL]
OUTPUTS = [*COLD, *WARM]


def test_the_rollouts_are_worth_testing_on(make_trainer, roll_out):
    lengths = roll_out(make_trainer())["completion_mask"].sum(-1).tolist()
    assert len(set(lengths)) >= 3 and min(lengths) < max(lengths) == 8


@pytest.mark.parametrize(
    ("loss", "layers", "positions", "reduction"),
    [
        *[(loss, "all", "all", "rollout") for loss in REPRESENTATION_LOSSES],
        *[("mse", layers, "all", "rollout") for layers in ("last", "1", "1=2")],
        *[("mse", "all", positions, "rollout") for positions in ("last=3", "first=2", "last", "last=2000")],
        *[("relative_mse", "last", positions, "token") for positions in ("all", "last=3", "first=2")],
    ],
)
def test_representation_loss(make_trainer, roll_out, gradient, loss, layers, positions, reduction):
    trainer = make_trainer(representation_loss=loss, layers=layers, positions=positions, reduction=reduction)
    batch = roll_out(trainer)
    expected = by_hand.representation_loss(
        trainer.model,
        trainer.teacher.model,
        by_hand.rollouts(batch),
        PAIRS[layers],
        loss,
        positions,
        reduction,
    )
    agree(trainer, gradient, batch, expected)


def test_layer_before_the_final_norm(make_trainer, roll_out, gradient):
    trainer = make_trainer(layers="last", final_norm=False)
    batch = roll_out(trainer)
    states = {}
    hooks = [
        model.model.layers[-1].register_forward_hook(lambda m, a, out, name=name: states.update({name: out}))
        for name, model in (("student", trainer.model), ("teacher", trainer.teacher.model))
    ]
    values = []
    for prompt, completion, supervised in by_hand.rollouts(batch):
        for model in (trainer.model, trainer.teacher.model):
            by_hand.states_and_logits(model, prompt, completion)
        rows = slice(len(prompt) - 1, len(prompt) - 1 + len(supervised))
        s, t = states["student"][0, rows].double(), states["teacher"][0, rows].double().detach()
        values.append([by_hand.representation_row("mse", a, b) for a, b in zip(s, t, strict=True)])
    for hook in hooks:
        hook.remove()
    agree(trainer, gradient, batch, by_hand.reduce(values, "rollout"))


@pytest.mark.parametrize("kind", OUTPUTS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_output_loss(make_trainer, roll_out, gradient, kind):
    trainer = make_trainer(representation_weight="0", **kind)
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    expected = by_hand.output_loss(trainer.model, trainer.teacher.model, given, kind)
    agree(trainer, gradient, batch, expected)


@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_composite_is_the_weighted_sum(make_trainer, roll_out, gradient, chunk):
    kind = {"output_loss": "full_vocab"}
    trainer = make_trainer(
        representation_weight="10",
        output_weight="0.5",
        positions="last=3",
        output_positions="first=2",
        reduction="token",
        output_chunk_size=chunk,
        **kind,
    )
    batch = roll_out(trainer)
    models, given = (trainer.model, trainer.teacher.model), by_hand.rollouts(batch)
    representation = by_hand.representation_loss(*models, given, PAIRS["all"], "mse", "last=3", "token")
    output = by_hand.output_loss(*models, given, kind, "first=2", "token")
    agree(trainer, gradient, batch, 10 * representation + 0.5 * output)


def test_deeper_teacher_is_paired_by_relative_depth(make_trainer, make_folder, roll_out, gradient, caplog):
    trainer = make_trainer(teacher=make_folder(3, num_hidden_layers=4))
    assert "the student has 2 layers and the teacher 4" in caplog.text
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    expected = by_hand.representation_loss(trainer.model, trainer.teacher.model, given, [(1, 1), (2, 4)])
    agree(trainer, gradient, batch, expected)


REPRESENTATION = [{"representation_loss": loss} for loss in REPRESENTATION_LOSSES]


@pytest.mark.parametrize("kind", REPRESENTATION, ids=lambda kind: kind["representation_loss"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_equal_models_have_exactly_zero_loss_and_gradient(
    make_trainer, roll_out, gradient, student, kind, checkpointing
):
    trainer = make_trainer(teacher=student, gradient_checkpointing=checkpointing, **kind)
    value, given = gradient(trainer, roll_out(trainer))
    assert value == 0.0
    assert torch.count_nonzero(given) == 0


@pytest.mark.parametrize("kind", COLD, ids=lambda kind: "-".join(map(str, kind.values())))
def test_equal_models_have_no_output_loss(make_trainer, roll_out, gradient, student, kind):
    trainer = make_trainer(teacher=student, representation_weight="0", **kind)
    value, given = gradient(trainer, roll_out(trainer))
    assert abs(value) <= 1e-6
    if kind.get("renormalize", True):  # the truncated sum is no divergence: its gradient is that of p(S)
        assert given.abs().max() <= 1e-6


def test_a_loss_of_the_users_own(make_trainer, roll_out, gradient):
    """A function in place of a name: value and gradient by hand."""
    trainer = make_trainer(representation_loss=lambda s, t: (s - t).square().sum(-1) / t.square().sum(-1))
    batch = roll_out(trainer)
    given, models = by_hand.rollouts(batch), (trainer.model, trainer.teacher.model)
    agree(trainer, gradient, batch, by_hand.representation_loss(*models, given, PAIRS["all"], "relative_mse"))


def test_a_loss_of_the_users_own_that_no_step_could_use(make_trainer):
    with pytest.raises(UserError, match=r"one value for each of 3 rows, \[3\], and returned \[\]"):
        make_trainer(representation_loss=lambda s, t: (s - t).square().mean())
