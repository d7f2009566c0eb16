"""What must not change an update: padding, order, micro-batches, accumulation, checkpointing, chunking."""

import pytest
import torch
from torch.nn.functional import pad
from transformers import TrainerCallback

from oprd.foundation.errors import UserError
from oprd.objective.composite import num_units, row_weights
from spies import FLASH, Calls, Runs
from updates import close, pieces, scripted

BOTH = {"output_loss": "full_vocab", "layers": "1", "representation_weight": "3"}
OBJECTIVES = [
    {"representation_loss": "mse"},
    {"representation_loss": "relative_mse", "positions": "last=3", "reduction": "token"},
    {"representation_weight": "0", "output_loss": "sampled_token", "reduction": "token"},
    {"representation_weight": "0", "output_loss": "top_k", "output_top_k": 4},
    BOTH,
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_budget_of_tokens(make_trainer, objective):
    """Three steps with momentum: packed by tokens, whatever the budget, and in fixed micro-batches."""

    def run(accumulation, **changes):
        settings = {"num_generations": 1, "optim": "sgd", "optim_args": "momentum=0.9", "max_steps": 3}
        settings |= {"per_device_train_batch_size": 6 // accumulation, "learning_rate": 0.1}
        settings |= {"gradient_accumulation_steps": accumulation}
        trainer = make_trainer(script=scripted, **settings, **objective, **changes)
        trainer.train()
        kept = ("loss/", "grad_norm", "representation/", "rollout/")
        log = [
            {k: v for k, v in e.items() if k.startswith(kept)}
            for e in trainer.state.log_history
            if "loss/total" in e
        ]
        return log, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    log, weights = run(1)
    for accumulation, budget, padding_free in (
        (1, 10**6, False),
        (3, 40, False),
        (3, 60, True),
        (1, 1, True),
    ):
        keys = {"max_tokens_per_micro_batch": budget, "padding_free": padding_free}
        packed, given = run(accumulation, **keys)
        assert len(packed) == len(log) == 3
        for one, other in zip(log, packed, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-6)  # the sampled token's terms nearly cancel
        torch.testing.assert_close(given, weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    "splits", [[[0], [1], [2], [3], [4], [5]], [[0, 1, 2, 3], [4, 5]], [[5, 3, 1, 4, 2, 0]]]
)
def test_micro_batches_and_order(make_trainer, roll_out, gradient, objective, splits):
    trainer = make_trainer(script=scripted, mask_truncated_completions=True, **objective)
    batch = roll_out(trainer)
    rows = batch["representation_weights"].count_nonzero(-1)
    assert 0 in rows and len(rows.unique()) >= 3  # a rollout without a row, and others of uneven lengths
    close(gradient(trainer, batch), gradient(trainer, *pieces(batch, splits)))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_amount_and_content(make_trainer, roll_out, gradient, objective):
    trainer = make_trainer(script=scripted, **objective)
    batch = roll_out(trainer)
    padded = {
        key: pad(value, (3, 0) if key.startswith("prompt") else (0, 4)) if value.ndim else value
        for key, value in batch.items()
    }
    for name in ("prompt", "completion"):
        noise = torch.randint(0, 280, padded[f"{name}_ids"].shape)
        padded[f"{name}_ids"] = torch.where(padded[f"{name}_mask"].bool(), padded[f"{name}_ids"], noise)
    assert not torch.equal(padded["completion_ids"][:, :8], batch["completion_ids"])
    close(gradient(trainer, batch), gradient(trainer, padded))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("objective", [OBJECTIVES[0], BOTH], ids=str)
def test_gradient_checkpointing(make_trainer, roll_out, gradient, objective, reentrant):
    trainer = make_trainer(script=scripted, **objective)
    batch = roll_out(trainer)
    plain = gradient(trainer, batch)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # as `train` does
    inside = Calls(*(block.mlp for block in trainer.model.model.layers))
    close(plain, gradient(trainer, batch))
    begun_with = objective is not BOTH  # an output loss is made after the forward, not at its hooks
    assert inside.count == 2 * len(trainer.model.model.layers) - begun_with  # run again by the backward


@pytest.mark.parametrize("objective", [OBJECTIVES[0], BOTH], ids=str)
def test_kept_attention(make_trainer, roll_out, gradient, objective):
    """The gradient is the same to the bit, and attention runs once in a block."""
    found = []
    for keep in (False, True):
        trainer = make_trainer(script=scripted, gradient_checkpointing=True, keep_attention=keep, **objective)
        batch = roll_out(trainer)
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})  # as `train` does
        with Runs(FLASH) as attended:
            found.append(gradient(trainer, batch))
        blocks, read = len(trainer.model.model.layers), max(trainer.update.layer_map.teacher_layers)
        again = 0 if keep else blocks - (objective is not BOTH)
        assert attended.count == blocks + again + (blocks if objective is BOTH else read)
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_attention_that_could_not_be_kept_is_told_before_the_first_rollout(make_trainer):
    with pytest.raises(UserError, match="keep_attention: true, but gradient_checkpointing is off"):
        make_trainer(keep_attention=True)


class Gradients(TrainerCallback):
    """Keeps the gradient of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_accumulated_steps_of_a_run(make_trainer, objective):
    """4 × 1, 2 × 2 and 1 × 4 train on the same rollouts: the same losses, gradients and weights."""
    runs = []
    for per_device in (4, 2, 1):
        gradients = Gradients()
        trainer = make_trainer(
            script=scripted,
            mask_truncated_completions=True,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=4 // per_device,
            max_grad_norm=1e9,
            optim="sgd",
            **objective,
        )
        trainer.add_callback(gradients)
        trainer.train()
        losses = [entry["loss/total"] for entry in trainer.state.log_history if "loss/total" in entry]
        reported = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert reported == pytest.approx(losses, rel=1e-4, abs=1e-4)
        runs.append((losses, gradients.steps))
    (losses, steps), *others = runs
    assert len(losses) == len(steps) == 2
    for other_losses, other_steps in others:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for one, other in zip(steps, other_steps, strict=True):
            total = torch.stack([g.norm() for g in one.values()]).norm()
            error = torch.stack([(one[name] - other[name]).norm() for name in one]).norm()
            assert total > 0 and error <= 2e-6 * total


def test_pad_equal_to_eos(make_trainer, roll_out, gradient, tokenizer):
    """Only the ids of padding differ: the EOS at the end of a rollout is supervised and not truncated."""
    import copy

    shared = copy.deepcopy(tokenizer)
    shared.pad_token = shared.eos_token
    settings = {"script": scripted, "mask_truncated_completions": True}
    plain = make_trainer(**settings)
    equal = make_trainer(extra={"processing_class": shared}, **settings)
    assert equal._tokenizer.pad_token_id == equal._tokenizer.eos_token_id
    one, other = roll_out(plain), roll_out(equal)
    for key in ("completion_mask", "representation_weights", "output_weights"):
        assert torch.equal(one[key], other[key])
    assert not torch.equal(one["completion_ids"], other["completion_ids"])
    close(gradient(plain, one), gradient(equal, other))


@pytest.mark.parametrize("reduction", ["rollout", "token"])
def test_row_weights_sum_to_one_over_any_split(reduction):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(7, 5, generator=generator) > 0.5
    mask[2] = False
    parts = [mask[:1], mask[1:3], mask[3:]]
    total = sum(num_units(part, reduction) for part in parts)
    weights = torch.cat([row_weights(part, reduction, total) for part in parts])
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights > 0, mask)
    rows = mask.sum(-1)
    unit = 1 / (6 * rows.clamp(min=1)) if reduction == "rollout" else torch.full((7,), 1 / mask.sum())
    torch.testing.assert_close(weights, mask * unit[:, None])
