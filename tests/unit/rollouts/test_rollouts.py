import pytest
import torch
from transformers import GenerationConfig

from oprd.foundation.errors import UserError
from oprd.models.eos import eos_token_ids, listed_eos_ids
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.rollouts.generation import OwnDraws, Rollout, Sampling, candidates, generate, warpers
from oprd.text.rendering import Renderer
from tiny_qwen import tiny_qwen

torch.set_num_threads(1)
QUESTION = [{"role": "user", "content": "Compute 1+2."}]
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=1.0)


@pytest.fixture
def tokenizer():
    return train_tokenizer(["user\nCompute 1+2.", "assistant\n1+2=3"])


@pytest.fixture
def model(tokenizer):
    return tiny_qwen(tokenizer)


def prompts(tokenizer, count=6):
    return Renderer(tokenizer)(["Compute " + "1+" * i + "2." for i in range(count)])


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_new_tokens": 0}, {"top_k": -1}]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_every_end_of_sequence_counts(model, tokenizer):
    model.generation_config.eos_token_id = [7, tokenizer.eos_token_id]
    assert eos_token_ids(model, tokenizer) == [tokenizer.eos_token_id, 7]
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(UserError, match="EOS"):
        eos_token_ids(model, tokenizer)


def test_the_end_of_turn_counts_too(model, tokenizer):
    """A base model's EOS is not what its chat template ends a turn with."""
    end = tokenizer.eos_token_id
    tokenizer.eos_token = tokenizer.pad_token
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert eos_token_ids(model, tokenizer) == [tokenizer.eos_token_id, end]
    assert listed_eos_ids(model, tokenizer) == [tokenizer.eos_token_id]
    given = GenerationConfig(eos_token_id=[7, end])
    assert eos_token_ids(model, tokenizer, given) == [tokenizer.eos_token_id, 7, end]
    tokenizer.chat_template = None
    assert eos_token_ids(model, tokenizer) == [tokenizer.eos_token_id]


def test_the_text_of_a_rollout_has_no_end_token():
    assert Rollout([1], [5, 6, 2], truncated=False).text_ids == [5, 6]
    assert Rollout([1], [5, 6, 2], truncated=True).text_ids == [5, 6, 2]


def test_same_seed_same_rollouts_and_global_random_state_left_alone(model, tokenizer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = generate(model, tokenizer, prompts(tokenizer), DRAWN, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert generate(model, tokenizer, prompts(tokenizer), DRAWN, seed=1) == first
    assert generate(model, tokenizer, prompts(tokenizer), DRAWN, seed=2) != first


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_responses_end_with_their_first_eos(model, tokenizer, pad_is_eos):
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    model.generation_config.eos_token_id = [eos, *range(20, 60)]
    ends = eos_token_ids(model, tokenizer)
    rollouts = generate(model, tokenizer, prompts(tokenizer, 24), DRAWN, seed=0)
    assert {r.truncated for r in rollouts} == {True, False}
    for rollout, prompt in zip(rollouts, prompts(tokenizer, 24), strict=True):
        assert rollout.prompt_ids == prompt
        assert not set(rollout.response_ids[:-1]) & set(ends)
        assert (rollout.response_ids[-1] in ends) is not rollout.truncated
        assert len(rollout.response_ids) == 12 or not rollout.truncated


def test_greedy_equals_argmax_whatever_the_padding(model, tokenizer):
    rollouts = generate(model, tokenizer, prompts(tokenizer), Sampling(8, temperature=0), seed=0)
    for rollout in rollouts:
        for i, token in enumerate(rollout.response_ids):
            logits = model(torch.tensor([rollout.prompt_ids + rollout.response_ids[:i]])).logits
            assert logits[0, -1].argmax() == token


LEAKS = {
    "top_k": {"do_sample": True, "top_k": 1},
    "repetition_penalty": {"repetition_penalty": 50.0},
    "suppress_tokens": {"suppress_tokens": list(range(100))},
    "min_p and length": {"do_sample": True, "min_p": 0.9, "max_length": 3, "min_new_tokens": 9},
}


@pytest.mark.parametrize("options", LEAKS.values(), ids=LEAKS.keys())
@pytest.mark.parametrize("sampling", [DRAWN, Sampling(8, temperature=0)], ids=["drawn", "greedy"])
def test_the_models_generation_config_does_not_leak(model, tokenizer, options, sampling):
    expected = generate(model, tokenizer, prompts(tokenizer), sampling, seed=3)
    own = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **options)
    model.generation_config = own
    assert generate(model, tokenizer, prompts(tokenizer), sampling, seed=3) == expected
    assert model.generation_config is own


def test_peft_models_too(model, tokenizer):
    from peft import LoraConfig, get_peft_model

    expected = generate(model, tokenizer, prompts(tokenizer), DRAWN, seed=3)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, do_sample=True, top_k=1)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert generate(wrapped, tokenizer, prompts(tokenizer), DRAWN, seed=3) == expected
    assert wrapped.generation_config.top_k == 1


def test_top_k_and_top_p_cut_the_distribution(model, tokenizer):
    greedy = generate(model, tokenizer, prompts(tokenizer), Sampling(8, temperature=0), seed=0)
    for cut in ({"top_k": 1, "top_p": 1.0}, {"top_p": 1e-6}):
        assert generate(model, tokenizer, prompts(tokenizer), Sampling(8, 1.0, **cut), seed=0) == greedy


def test_more_than_fifty_tokens_are_drawn_without_top_k(model, tokenizer):
    """HF's default of top_k=50 must not apply."""
    batch = [[5]] * 400
    rollouts = generate(model, tokenizer, batch, Sampling(1, 1.0, 1.0), seed=0)
    assert len({r.response_ids[0] for r in rollouts}) > 50


def test_a_seed_of_its_own_makes_a_response_independent_of_the_batch(model, tokenizer):
    model = model.double()  # padding changes the rounding
    batch, seeds = prompts(tokenizer), range(6)
    sampling = Sampling(12, temperature=0.9, top_p=0.9, top_k=40)
    together = generate(model, tokenizer, batch, sampling, seeds)
    assert together == [
        generate(model, tokenizer, [prompt], sampling, [seed])[0]
        for prompt, seed in zip(batch, seeds, strict=True)
    ]
    assert generate(model, tokenizer, batch, sampling, range(6, 12)) != together
    twice = generate(model, tokenizer, [batch[0]] * 2, sampling, [0, 1])
    assert twice[0] == together[0] and twice[1] != twice[0]
    greedy = Sampling(8, temperature=0)
    assert generate(model, tokenizer, batch, greedy, seeds) == generate(model, tokenizer, batch, greedy, 0)


def test_seeds_of_their_own_draw_the_models_distribution(model, tokenizer):
    """20,000 first tokens, cut to ten: their shares against the softmax, within four standard errors."""
    count = 20_000
    drawn = generate(model, tokenizer, [[5]] * count, Sampling(1, 0.5, 1.0, 10), range(count))
    shares = (
        torch.bincount(torch.tensor([r.response_ids[0] for r in drawn]), minlength=len(tokenizer)) / count
    )
    with torch.no_grad():
        likeliest, ids = (model(torch.tensor([[5]])).logits[0, -1] / 0.5).topk(10)
    wanted = torch.zeros(len(tokenizer)).scatter(0, ids, likeliest.softmax(-1))
    assert ((shares - wanted).abs() <= 4 * (wanted * (1 - wanted) / count).sqrt()).all()


@pytest.mark.parametrize("spread", [0.1, 3.0])  # almost uniform: the likeliest 512 of 2,000 are not enough
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (0.3, 0), (1.0, 7), (0.6, 40), (1.0, 5000)])
def test_candidates_are_those_that_the_cuts_of_transformers_leave(spread, top_p, top_k):
    scores = spread * torch.randn(6, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[0, 11] = -torch.inf  # a token that is suppressed
    tokens, shares = candidates(scores, Sampling(1, 0.7, top_p, top_k))
    found = torch.zeros_like(scores).scatter(1, tokens, shares / shares.sum(-1, keepdim=True))
    wanted = warpers(0.7, top_k, top_p)(torch.zeros(6, 1), scores).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-24])
def test_the_ends_of_the_random_numbers_draw_a_candidate(monkeypatch, number):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([number]))
    scores = torch.tensor([[-torch.inf, 1.0, 3.0, 2.0, -torch.inf]])
    for sampling in (Sampling(1, 1.0, 1.0), Sampling(1, 1.0, 0.8)):
        forced = OwnDraws(sampling, [0], torch.device("cpu"))(torch.zeros(1, 1), scores)
        tokens, shares = candidates(scores, sampling)
        kept = tokens[shares > 0].tolist()
        assert forced.argmax().item() == (kept[0] if number == 0 else kept[-1])


def test_modes_are_restored(model, tokenizer):
    model.train()
    model.model.layers[0].eval()
    generate(model, tokenizer, prompts(tokenizer, 1), DRAWN, seed=0)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
