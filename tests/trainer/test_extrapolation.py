"""RIDE: targets beyond the teacher, against ones written out by hand in float64, and where they lead."""

import copy

import pytest
import torch
from peft import LoraConfig

import by_hand
from oprd.foundation.errors import UserError
from oprd.objective import losses
from oprd.objective.extrapolation import extrapolate
from oprd.training.config import OPRDConfig
from tiny_pair import perturb
from updates import agree, close, scripted

FACTOR = 1.25


def beyond(teacher, reference):
    return FACTOR * teacher - (FACTOR - 1) * reference


def expected_loss(student, teacher, reference, batch, loss="mse", pairs=((1, 1), (2, 2)), positions="all"):
    """λ⁻² times Eq. 6 on targets beyond the teacher."""
    per_layer = []
    for ours, theirs in pairs:
        values = []
        for prompt, completion, supervised in by_hand.rollouts(batch):
            s = by_hand.states_and_logits(student, prompt, completion)[0][ours]
            with torch.no_grad():
                t, b = (
                    by_hand.states_and_logits(model, prompt, completion)[0][theirs]
                    for model in (teacher, reference)
                )
            rows = by_hand.chosen(supervised, positions)
            values.append([by_hand.representation_row(loss, s[row], beyond(t, b)[row]) for row in rows])
        per_layer.append(by_hand.reduce(values, "rollout"))
    return torch.stack(per_layer).mean() / FACTOR**2


@pytest.mark.parametrize("loss", losses.REPRESENTATION_LOSSES)
def test_states_beyond_the_teacher(make_trainer, make_folder, roll_out, gradient, loss):
    keys = {"representation_loss": loss, "positions": "last=3", "teacher_extrapolation": FACTOR}
    trainer = make_trainer(reference_model_name_or_path=make_folder(3), **keys)
    batch = roll_out(trainer)
    models = trainer.model, trainer.teacher.model, trainer.update.extrapolation.reference.model
    agree(trainer, gradient, batch, expected_loss(*models, batch, loss, positions="last=3"))


def test_the_reference_is_the_student_as_it_starts(make_trainer, roll_out, gradient):
    trainer = make_trainer(teacher_extrapolation=FACTOR, layers="1=2", positions="all")
    batch, start = roll_out(trainer), copy.deepcopy(trainer.model).eval()
    perturb(trainer.model, seed=4)
    expected = expected_loss(trainer.model, trainer.teacher.model, start, batch, pairs=[(1, 2)])
    agree(trainer, gradient, batch, expected)


def test_the_reference_of_adapters_is_the_model_below_them(make_trainer, roll_out, gradient):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    keys = {"teacher_extrapolation": FACTOR, "positions": "all"}
    trainer = make_trainer(extra={"peft_config": lora}, **keys)
    batch = roll_out(trainer)
    assert trainer.update.extrapolation.reference.model is trainer.model
    value, _ = gradient(trainer, batch)
    with trainer.model.disable_adapter():
        below = copy.deepcopy(trainer.model)
        below.base_model.disable_adapter_layers()
    models = trainer.model.eval(), trainer.teacher.model, below
    assert value == pytest.approx(expected_loss(*models, batch).item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["sampled_token", "full_vocab"])
def test_rewards_beyond_the_teacher(make_trainer, make_folder, roll_out, gradient, loss):
    keys = {"representation_weight": "0", "output_loss": loss, "teacher_temperature": 1.5}
    trainer = make_trainer(
        teacher_extrapolation=FACTOR, reference_model_name_or_path=make_folder(3), output_chunk_size=5, **keys
    )
    batch, values = roll_out(trainer), []
    for prompt, completion, supervised in by_hand.rollouts(batch):
        log_p = by_hand.states_and_logits(trainer.model, prompt, completion)[1].log_softmax(-1)
        with torch.no_grad():
            log_q, log_b = (
                (by_hand.states_and_logits(model, prompt, completion)[1] / 1.5).log_softmax(-1)
                for model in (trainer.teacher.model, trainer.update.extrapolation.reference.model)
            )
        gap = log_p - beyond(log_q, log_b)
        if loss == "full_vocab":  # of a distribution
            gap = gap + beyond(log_q, log_b).logsumexp(-1, keepdim=True)
        rows = by_hand.chosen(supervised, "all")
        if loss == "full_vocab":
            values.append([(log_p[row].exp() * gap[row]).sum() for row in rows])
        else:
            at = [(gap[row, completion[row]].detach(), log_p[row, completion[row]]) for row in rows]
            values.append([advantage + advantage * (log - log.detach()) for advantage, log in at])
    agree(trainer, gradient, batch, by_hand.reduce(values, "rollout"))


def test_a_composite_takes_both_beyond(make_trainer, make_folder, roll_out, gradient):
    both = {"teacher_extrapolation": FACTOR, "reference_model_name_or_path": make_folder(3)}
    parts = [
        {"output_loss": "sampled_token"},
        {},
        {"representation_weight": "0", "output_loss": "sampled_token"},
    ]
    found = []
    for keys in parts:
        trainer = make_trainer(script=scripted, **both, **keys)
        found.append(gradient(trainer, roll_out(trainer)))
    (value, whole), *rest = found
    close((value, whole), (sum(v for v, _ in rest), sum(g for _, g in rest)), tolerance=1e-5)


def test_one_is_the_teacher_to_the_bit_and_costs_nothing(make_trainer, roll_out, gradient):
    found = []
    for keys in ({}, {"teacher_extrapolation": 1.0}):
        trainer = make_trainer(script=scripted, output_loss="sampled_token", **keys)
        assert trainer.update.extrapolation is None and trainer.update.output.reference is None
        found.append(gradient(trainer, roll_out(trainer)))
    (value, given), (other, same) = found
    assert value == other and torch.equal(given, same)


@pytest.mark.parametrize("outputs", [{}, {"representation_weight": "0", "output_loss": "full_vocab"}])
def test_a_teacher_that_was_not_trained_asks_for_nothing(make_trainer, roll_out, gradient, student, outputs):
    trainer = make_trainer(teacher=student, script=scripted, teacher_extrapolation=FACTOR, **outputs)
    value, given = gradient(trainer, roll_out(trainer))
    assert value == pytest.approx(0, abs=1e-6) and given.abs().max() < 1e-6
    assert outputs or value == given.abs().max() == 0


def test_descent_ends_beyond_the_teacher():
    """Of a free state the optimum is h_T + (λ − 1)(h_T − h_B), and one step is λ⁻² as long."""
    teacher, reference = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
    target = extrapolate(teacher, reference, FACTOR)
    torch.testing.assert_close(target, torch.tensor([[3.5, -1.5]]))
    state = reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([state], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (losses.mse(state, target).sum() / FACTOR**2).backward()
        optimizer.step()
    torch.testing.assert_close(state.detach(), target)


def test_a_resumed_run_keeps_its_reference(make_trainer, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "teacher_extrapolation": 1.5, "max_steps": 3}
    straight = make_trainer(output_dir=str(tmp_path / "straight"), **keys)
    straight.train()
    make_trainer(output_dir=str(tmp_path / "parts"), **keys | {"max_steps": 1}).train()
    resumed = make_trainer(output_dir=str(tmp_path / "parts"), **keys)
    resumed.train(resume_from_checkpoint=True)
    for one, two in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"bridge": "runs/bridge"}, "a bridge joins two of different origin"),
        ({"output_loss": "top_k"}, "output_loss is top_k: change it"),
        ({"output_loss": "sampled_text"}, "output_loss is sampled_text: change it"),
        ({"teacher_extrapolation": 0}, "teacher_extrapolation must be above 0"),
        (
            {"teacher_extrapolation": 1, "reference_model_name_or_path": "x"},
            "teacher_extrapolation, which is 1",
        ),
    ],
)
def test_what_has_no_extrapolation(keys, says):
    with pytest.raises(UserError, match=says):
        OPRDConfig(**{"teacher_extrapolation": FACTOR} | keys)


def test_a_reference_of_another_shape(make_trainer, make_folder):
    deep = make_folder(3, num_hidden_layers=3)
    with pytest.raises(
        UserError, match="32 wide with 2 layers, the reference 32 wide with 3: name the model"
    ):
        make_trainer(teacher_extrapolation=FACTOR, reference_model_name_or_path=deep)
