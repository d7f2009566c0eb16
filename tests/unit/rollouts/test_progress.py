"""What moves on the screen while a model generates, and the line before the first rollout."""

import io

import pytest
import torch
from tqdm import tqdm

from oprd.objective.selection import LayerMap
from oprd.rollouts import progress
from oprd.rollouts.progress import tokens_shown
from oprd.training.config import OPRDConfig
from oprd.training.start_line import start_line


def generate(model, lengths):
    """Greedy tokens after prompts of given lengths, one prompt after the other."""
    for length in lengths:
        ids = torch.full((2, length), 5)
        model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=6, max_new_tokens=6)


@pytest.fixture
def shown(tiny_model, monkeypatch):
    """`shown(lengths, seconds)`: what a bar shows of generation, if it may change every so many seconds."""

    def show(lengths=(3,), seconds=0.0, **bar_options):
        monkeypatch.setattr(progress, "ELSEWHERE", seconds)
        model, screen = tiny_model(), io.StringIO()
        hooks = len(model.get_input_embeddings()._forward_hooks)
        with tqdm(total=2, file=screen, ncols=80, **bar_options) as bar:
            bar.set_postfix(loss=2)
            with tokens_shown(bar, "rollouts", model, 1024):
                generate(model, lengths)
            assert len(model.get_input_embeddings()._forward_hooks) == hooks
            bar.refresh()
        return [line.rpartition("?it/s, ")[2].rstrip("] ") for line in screen.getvalue().split("\r")[1:]]

    return show


def test_every_token_is_counted_and_the_bar_is_left_as_it_was(shown):
    lines = shown()
    told = [f"rollouts: token {count} of 1,024" for count in range(1, 7)]
    assert [line for line in lines if line.startswith("rollouts")] == told
    assert "loss=2" in lines[-1] and "token" not in lines[-1]


def test_the_next_prompts_begin_at_one(shown):
    counts = [line.split()[2] for line in shown(lengths=(3, 2)) if line.startswith("rollouts")]
    assert counts == [*"123456", *"123456"]


def test_a_bar_changes_no_more_often_than_it_may(shown):
    assert not any("token" in line for line in shown(seconds=3600))


def test_a_bar_that_is_off_costs_nothing(shown):
    assert shown(disable=True) == []


@pytest.mark.parametrize(
    ("keys", "processes", "steps", "line"),
    [
        (
            {},
            8,
            (1, 500),
            "500 steps of 128 rollouts (64 prompts × 2) of up to 16,384 tokens, by Hugging Face's generate; "
            "mse (28 layers, rows last=2000); bf16 on 8 × cpu; writes to runs/x",
        ),
        (
            {
                "representation_weight": "0=10,400=0",
                "output_loss": "sampled_token",
                "output_weight": "0.5",
                "bf16": False,
                "max_completion_length": 64,
                "positions": "all",
            },
            1,
            (121, 220),
            "steps 121 to 220 of 16 rollouts (8 prompts × 2) of up to 64 tokens, by Hugging Face's generate; "
            "[0=10,400=0] × mse (28 layers, rows all) + 0.5 × sampled_token (rows all); float32 on cpu; "
            "writes to runs/x",
        ),
        (
            {
                "representation_weight": 0,
                "output_loss": "full_vocab",
                "num_generations": 1,
                "max_completion_length": None,
                "gradient_accumulation_steps": 1,
            },
            1,
            (1, 1),
            "1 step of 2 rollouts (2 prompts × 1) of any length, by Hugging Face's generate; "
            "full_vocab (rows all); bf16 on cpu; writes to runs/x",
        ),
        (
            {"bridge": "runs/bridge", "anchor_weight": 1, "layers": "last"},
            1,
            (1, 2),
            "2 steps of 16 rollouts (8 prompts × 2) of up to 16,384 tokens, by Hugging Face's generate; "
            "normalized_mse (1 layer, rows last=2000 through a bridge) + anchor; bf16 on cpu; "
            "writes to runs/x",
        ),
    ],
    ids=["the defaults", "resumed", "an output loss", "through a bridge"],
)
def test_the_line_before_the_first_rollout(keys, processes, steps, line):
    config = OPRDConfig(output_dir="runs/x", use_cpu=True, report_to="none", **keys)
    layer_map = LayerMap.parse(config.layers, 28, 28)
    assert start_line(config, layer_map, processes, *steps) == line
