"""Rows that count more than others, in whole updates: by hand, whatever the micro-batches."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import by_hand
from oprd.foundation.errors import UserError
from oprd.models.tiny.tokenizer import train_tokenizer
from updates import agree, close, pieces, scripted


def importance(student, teacher, prompt, completion):
    """IW-OPD's weights of all rows of a rollout."""
    with torch.no_grad():
        log_p, log_q = (
            by_hand.states_and_logits(model, prompt, completion)[1].log_softmax(-1)
            for model in (student, teacher)
        )
    gaps = [float((log_p[t, token] - log_q[t, token]).abs()) for t, token in enumerate(completion)]
    return [1 + 0.5 * (1 - sum(gaps[:t]) / sum(gaps)) for t in range(len(gaps))]


def weighed(weights, rows, values):
    mean = sum(weights[row] for row in rows) / len(rows)
    return [weights[row] / mean * value for row, value in zip(rows, values, strict=True)]


@pytest.mark.parametrize(
    "output", [{}, {"output_loss": "sampled_token", "output_positions": "first=4"}], ids=str
)
def test_earlier_rows_count_more(make_trainer, roll_out, gradient, output):
    trainer = make_trainer(row_weights="importance", positions="last=3", layers="last", **output)
    batch = roll_out(trainer)
    models, states, tokens = (trainer.model, trainer.teacher.model), [], []
    for prompt, completion, supervised in by_hand.rollouts(batch):
        weights = importance(*models, prompt, completion)
        (s, p), (t, q) = (by_hand.states_and_logits(model, prompt, completion) for model in models)
        rows = by_hand.chosen(supervised, "last=3")
        values = [by_hand.representation_row("mse", s[-1][row], t[-1][row].detach()) for row in rows]
        states.append(weighed(weights, rows, values))
        rows = by_hand.chosen(supervised, "first=4")
        values = (
            [by_hand.output_row(output, p[row], q[row].detach(), completion[row]) for row in rows]
            if output
            else []
        )
        tokens.append(weighed(weights, rows, values) if output else [])
    expected = by_hand.reduce(states, "rollout")
    if output:
        expected = expected + by_hand.reduce(tokens, "rollout")
    agree(trainer, gradient, batch, expected)


def test_rows_of_large_losses_count_more(make_trainer, roll_out, gradient):
    trainer = make_trainer(row_weights="gap", positions="all")
    batch, per_layer = roll_out(trainer), []
    for layer in (1, 2):
        values = []
        for prompt, completion, supervised in by_hand.rollouts(batch):
            s, t = (
                by_hand.states_and_logits(model, prompt, completion)[0][layer]
                for model in (trainer.model, trainer.teacher.model)
            )
            rows = by_hand.chosen(supervised, "all")
            here = [by_hand.representation_row("mse", s[row], t[row].detach()) for row in rows]
            values.append(weighed([value.detach() for value in here], range(len(here)), here))
        per_layer.append(by_hand.reduce(values, "rollout"))
    agree(trainer, gradient, batch, torch.stack(per_layer).mean())


@pytest.mark.parametrize("kind", ["importance", "gap"])
def test_micro_batches_do_not_matter(make_trainer, roll_out, gradient, kind):
    trainer = make_trainer(row_weights=kind, output_loss="full_vocab")
    batch = roll_out(trainer)
    for model in (trainer.model, trainer.teacher.model):
        model.double()
    close(
        gradient(trainer, batch), gradient(trainer, *pieces(batch, [[3, 1], [0, 4, 5], [2]])), tolerance=1e-10
    )


def test_equal_models_have_no_loss(make_trainer, roll_out, gradient, student):
    trainer = make_trainer(teacher=student, row_weights="importance", script=scripted)
    value, given = gradient(trainer, roll_out(trainer))
    assert value == 0 and given.abs().max() == 0


def test_adapters(make_trainer, roll_out, gradient):
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    found = []
    for kind in ("uniform", "importance"):
        trainer = make_trainer(row_weights=kind, extra={"peft_config": lora}, script=scripted)
        found.append(gradient(trainer, roll_out(trainer)))
    assert found[0][0] != found[1][0] and found[1][1].abs().max() > 0


def test_importance_needs_one_tokenizer(make_trainer, make_folder, tokenizer, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(make_folder(2))
    other.save_pretrained(tmp_path / "other")
    train_tokenizer(["some other words"] * 9, vocab_size=280).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="row_weights: importance compares the probabilities"):
        make_trainer(
            teacher=str(tmp_path / "other"),
            row_weights="importance",
            representation_weight="0",
            output_loss="sampled_text",
        )
