"""Rollouts of an engine whose log-probs are not quite the trainer's: weights, and the gap that is logged."""

import copy

import pytest
import torch

import by_hand
from oprd.foundation.errors import UserError
from oprd.rollouts.engines.importance import importance_weights
from oprd.rollouts.engines.staleness import (
    CHECKED_TOKENS,
    READ_AGAIN_EVERY,
    FixedText,
    check_gap,
    check_moved_alone,
    log_prob_gaps,
    student_log_probs,
)
from oprd.rollouts.engines.student import Drawn
from oprd.training.config import OPRDConfig

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
    with pytest.raises(UserError, match="have no engine log-probs"):
        trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_vllm": False}, "use_vllm is false"),
        ({"output_loss": "top_k"}, "belongs to output_loss: sampled_token, and output_loss is top_k"),
        ({"output_loss": "sampled_text"}, "output_loss is sampled_text"),
        ({"vllm_importance_sampling_clip_max": 0.0}, "clip_max must be above 0 and finite, got 0.0"),
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


class Holder:
    """An engine with a copy of the student's weights, in `dtype`, made when it is handed them."""

    is_awake = True

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def hand_over(self, model):
        self.model = copy.deepcopy(model).to(self.dtype)

    def score(self, prompt, response):
        return student_log_probs(self.model, prompt, response, torch.device("cpu")).tolist()


def moved(model, engine, drawn, hand_overs, step=1e-6, arrives=lambda n: True):
    """What every hand-over finds, the student's weights moving by ± `step` before each."""
    generator, text, found = torch.Generator().manual_seed(0), FixedText(), []
    for n in range(1, hand_overs + 1):
        with torch.no_grad():
            for p in model.parameters():
                p += step * torch.randint(0, 2, p.shape, generator=generator).mul(2).sub(1)
        if arrives(n):
            engine.hand_over(model)
        found.append(text.moved_alone(engine, model, drawn, torch.device("cpu")))
    return found


PROMPT, RESPONSE = [30, 31, 32], list(range(50, 95))
DRAWN = Drawn([PROMPT], [RESPONSE], [[0.0] * len(RESPONSE)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_arrive_move_the_engine_however_little(make_trainer, dtype):
    assert moved(make_trainer().model.eval(), Holder(dtype), DRAWN, 4 * READ_AGAIN_EVERY) == [0.0] * 32


@pytest.mark.parametrize("last", [1, READ_AGAIN_EVERY + 3])
def test_an_engine_that_stands_still_is_told(make_trainer, last):
    model = make_trainer().model.eval()
    kept = Holder()
    found = moved(model, kept, DRAWN, 3 * READ_AGAIN_EVERY, arrives=lambda n: n <= last)
    visits = [READ_AGAIN_EVERY * n - 1 for n in (1, 2, 3)]
    assert all(value == 0 for n, value in enumerate(found) if n not in visits)
    # The first visit knows nothing yet, and one after the last hand-over sees that move.
    told = found[visits[1]] if last == 1 else found[visits[2]]
    assert found[visits[0]] == 0 and 1e-5 < told < 1e-2
    with pytest.raises(RuntimeError, match="have not moved at all: it does not hold the student's weights"):
        check_moved_alone(told, (torch.float32, torch.float32), 16)
    check_gap(told / 2, (None, torch.bfloat16), 16)  # which rounding could explain


def test_how_far_a_student_moved_alone(make_trainer):
    model = make_trainer().model.eval()
    engine, text, cpu = Holder(), FixedText(), torch.device("cpu")
    engine.hand_over(model)
    for _ in range(READ_AGAIN_EVERY):
        assert text.moved_alone(engine, model, DRAWN, cpu) == 0
    before = student_log_probs(model, PROMPT, RESPONSE[: CHECKED_TOKENS - 1], cpu)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    other = Drawn([[40]], [list(range(60, 100))], [[0.0] * 40])  # the text stays that of the first rollouts
    *_, found = (text.moved_alone(engine, model, other, cpu) for _ in range(READ_AGAIN_EVERY))
    after = student_log_probs(model, PROMPT, RESPONSE[: CHECKED_TOKENS - 1], cpu)
    assert found == pytest.approx((after - before).abs().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("asleep", "response"), [(True, RESPONSE), (False, [50])])
def test_there_may_be_nothing_to_read_again(make_trainer, asleep, response):
    model, engine = make_trainer().model.eval(), Holder()
    engine.is_awake = not asleep
    drawn = Drawn([PROMPT], [response], [[0.0] * len(response)])
    assert moved(model, engine, drawn, 3 * READ_AGAIN_EVERY, arrives=lambda n: n == 1) == [0.0] * 24


@pytest.mark.parametrize(
    ("nats", "dtypes", "stops"),
    [
        (0.0, (torch.float32, torch.float32), False),
        (2e-5, (torch.float32, torch.float32), True),
        (2e-5, (None, torch.float32), False),
        (2e-3, (torch.bfloat16, torch.float32), True),
    ],
)
def test_the_move_that_stops_a_run_depends_on_the_precision(nats, dtypes, stops):
    if not stops:
        return check_moved_alone(nats, dtypes, 3)
    with pytest.raises(RuntimeError, match=r"step 3: the student's log-probs of a text have moved by "):
        check_moved_alone(nats, dtypes, 3)
