"""Rollouts of an engine whose log-probs are not quite the trainer's: weights, and the gap that is logged."""

import by_hand
import pytest
import torch

from oprd.errors import UserError
from oprd.importance import importance_weights
from oprd.student_engine import CHECKED_TOKENS, Drawn, check_gap, log_prob_gaps
from oprd.trainer import OPRDConfig

CORRECTED = {"use_vllm": True, "output_loss": "sampled_token", "vllm_importance_sampling_correction": True}


def engine_log_probs(batch, spread=1.0):
    """What an engine could have said of the sampled tokens: anything."""
    generator = torch.Generator().manual_seed(1)
    return -spread * torch.rand(batch["completion_ids"].shape, generator=generator) * 6


def rows_of(trainer, batch, temperature=1.0):
    """For every rollout, its rows' log-probs of both models and the engine's, in float64, with a graph."""
    for i, (prompt, completion, _) in enumerate(by_hand.rollouts(batch)):
        _, ours = by_hand.states_and_logits(trainer.model, prompt, completion)
        with torch.no_grad():
            _, theirs = by_hand.states_and_logits(trainer.teacher.model, prompt, completion)
        tokens = torch.tensor(completion)[:, None]
        raw, warm, log_q = (
            x.log_softmax(-1).gather(-1, tokens)[:, 0] for x in (ours, ours / temperature, theirs)
        )
        yield raw, warm, log_q, batch["engine_log_probs"][i, : len(completion)].double()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("cap", [0.5, 3.0, 1e9])
def test_weights_scale_value_and_gradient(make_trainer, roll_out, gradient, cap, temperature):
    trainer = make_trainer(
        representation_weight="0", output_loss="sampled_token", student_temperature=temperature
    )
    batch = roll_out(trainer)
    batch["engine_log_probs"] = engine_log_probs(batch)
    trainer.args.vllm_importance_sampling_correction = True
    trainer.args.vllm_importance_sampling_clip_max = cap
    per_rollout, weights = [], []
    for raw, warm, log_q, engine in rows_of(trainer, batch, temperature):
        weight = torch.minimum((raw.detach() - engine).exp(), torch.tensor(cap, dtype=torch.float64))
        advantage = (warm - log_q).detach()
        per_rollout.append((weight * (advantage + advantage * (warm - warm.detach()))).mean())
        weights.append(weight)
    expected = torch.stack(per_rollout).mean()
    value, given = gradient(trainer, batch)
    trainer.model.zero_grad()
    expected.backward()
    wanted = torch.cat([p.grad.double().flatten() for p in trainer.model.parameters()])
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert (given - wanted).norm() <= 2e-5 * wanted.norm()
    capped = torch.cat(weights) == cap
    assert capped.any() == (cap < 1e9) and not capped.all()


def test_weights_by_hand():
    ours, engine = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    weights = importance_weights(ours.requires_grad_(), engine, 2.0)
    assert weights.tolist() == pytest.approx([1.0, 0.36787944, 2.0])
    assert not weights.requires_grad


@pytest.mark.parametrize("loss", ["sampled_token", "top_k", "full_vocab"])
def test_the_gap_is_logged_where_logits_are_made(make_trainer, roll_out, gradient, loss):
    trainer = make_trainer(representation_weight="0", output_loss=loss, output_top_k=4)
    batch = roll_out(trainer)
    plain = gradient(trainer, batch)
    batch["engine_log_probs"] = engine_log_probs(batch)
    trainer.update.averages.pop(lambda x: x)
    value, given = gradient(trainer, batch)
    assert value == plain[0] and torch.equal(given, plain[1])
    gaps = torch.cat([(raw - engine).abs() for raw, _, _, engine in rows_of(trainer, batch)])
    assert len(gaps) < 64  # so that every row is one of those described
    logged = trainer.update.averages.pop(lambda x: x)["rollout/logprob_gap"]
    assert logged == pytest.approx(gaps.mean().item(), rel=1e-5)


def test_a_representation_loss_makes_no_logits_for_the_gap(make_trainer, roll_out, gradient):
    trainer = make_trainer()
    batch = roll_out(trainer)
    batch["engine_log_probs"] = engine_log_probs(batch)
    trainer.model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the LM head ran"))
    trainer.update.averages.pop(lambda x: x)
    gradient(trainer, batch)
    assert "rollout/logprob_gap" not in trainer.update.averages.pop(lambda x: x)


def test_rollouts_without_log_probs_cannot_be_weighed(make_trainer, roll_out):
    trainer = make_trainer(representation_weight="0", output_loss="sampled_token")
    batch = roll_out(trainer)
    trainer.args.vllm_importance_sampling_correction = True
    with pytest.raises(UserError, match="come without the engine's log-probs"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_vllm": False}, "use_vllm is false"),
        ({"output_loss": "top_k"}, "belongs to output_loss: sampled_token, and output_loss is top_k"),
        ({"output_loss": "sampled_text"}, "output_loss is sampled_text"),
        ({"vllm_importance_sampling_clip_max": 0.0}, "clip_max must be above 0, got 0.0"),
        ({"temperature": 0.7}, "the policy itself, and temperature is 0.7"),
        ({"top_p": 0.9}, "top_p is 0.9"),
        ({"top_k": 20}, "top_k is 20"),
        ({"min_p": 0.1}, "min_p is 0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1"),
    ],
)
def test_what_the_weights_cannot_correct_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        OPRDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **(CORRECTED | change))


def test_what_they_can_is_not(tmp_path):
    config = OPRDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **CORRECTED)
    assert config.vllm_importance_sampling_clip_max == 3.0


def test_the_check_compares_the_first_tokens_of_one_short_rollout(make_trainer):
    model = make_trainer().model.eval()
    prompts = [list(range(20, 29)), [30, 31, 32], [33, 34]]
    responses = [list(range(40, 90)), list(range(50, 95)), [96, 97]]  # the last is shorter than the check
    ours = []
    for prompt, response in zip(prompts, responses, strict=True):
        _, logits = by_hand.states_and_logits(model, prompt, response)
        ours.append(logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0].tolist())
    shifted = [[value + 0.25 * (i % 2) for i, value in enumerate(row)] for row in ours]
    gaps = log_prob_gaps(
        model, Drawn(prompts, responses, [ours[0], shifted[1], ours[2]]), torch.device("cpu")
    )
    assert gaps.tolist() == pytest.approx([0.25 * (i % 2) for i in range(CHECKED_TOKENS)], abs=1e-5)
    short = Drawn(prompts[2:], responses[2:], ours[2:])
    assert log_prob_gaps(model, short, torch.device("cpu")).tolist() == pytest.approx([0, 0], abs=1e-5)


def test_log_probs_are_padded_to_the_responses():
    drawn = Drawn([[1], [1]], [[2, 3], [4]], [[-1.0, -2.0], [-3.0]])
    assert drawn.padded(4, torch.device("cpu")).tolist() == [[-1, -2, 0, 0], [-3, 0, 0, 0]]


@pytest.mark.parametrize(
    ("gap", "dtypes", "stops"),
    [
        (1e-5, (torch.float32, torch.float32), False),
        (2e-3, (torch.float32, torch.float32), True),
        (2e-3, (torch.float32, torch.bfloat16), False),
        (0.02, (None, torch.float32), False),
        (0.2, (torch.bfloat16, torch.bfloat16), True),
        (float("nan"), (torch.bfloat16, torch.bfloat16), True),
    ],
)
def test_the_gap_that_stops_a_run_depends_on_the_precision(gap, dtypes, stops):
    if not stops:
        return check_gap(gap, dtypes, 3)
    with pytest.raises(RuntimeError, match=r"step 3: .* it does not hold the student's weights"):
        check_gap(gap, dtypes, 3)
