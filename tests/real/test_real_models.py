"""Real models, where they are laid: two steps of every laptop pair, bridges, alignment of tokenizers."""

import json
import re
import subprocess
import sys
import unicodedata
from functools import cache
from itertools import accumulate, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oprd import align_tokens, load_prompts, load_tokenizer
from oprd.cli.commands import run
from oprd.folders.recorder import read_metrics
from places import RECIPES, ROOT
from real_models import GEMMA, QWEN, SMOLLM2, real_model

pytestmark = pytest.mark.drill

QUICK = {
    "per_device_train_batch_size": 2,
    "max_completion_length": 16,
    "max_steps": 2,
    "warmup_steps": 0,  # or the first step would not move the student
    "accuracy_dataset_name": "null",
    "save_steps": 2,
}
LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


@cache
def tokenizer(name):
    return load_tokenizer(real_model(name))


def spelled(name, token):
    """The bytes of one token, from its entry in the vocabulary alone."""
    if name != GEMMA:
        return bytes(LETTERS[letter] for letter in token)
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def brute_force(name, ids, other, other_ids):
    """Every pair of tokens up to which the same bytes are spelled: SmolLM2 lacks tokens for some."""
    ours, theirs = (
        list(accumulate(spelled(which, token) for token in tokenizer(which).convert_ids_to_tokens(numbers)))
        for which, numbers in ((name, ids), (other, other_ids))
    )
    return [(i, theirs.index(text)) for i, text in enumerate(ours) if text in theirs]


def check_alignment(text):
    text = unicodedata.normalize("NFC", text).replace("▁", "")
    for name, other in permutations((SMOLLM2, QWEN, GEMMA), 2):
        ids, other_ids = (
            tokenizer(which)(text, add_special_tokens=False, split_special_tokens=True).input_ids
            for which in (name, other)
        )
        pairs = align_tokens(tokenizer(name), ids, tokenizer(other), other_ids)
        assert pairs == brute_force(name, ids, other, other_ids), (name, other, text)


@pytest.mark.parametrize(
    "text",
    [
        *load_prompts("word-problems", "train")[:40]["worked_solution"],
        "Naïve café, 12 × 3.5 = 42; 日本語のテキスト、한국어, العربية 👩‍👩‍👧‍👦🇩🇪",
        "for i in range(10):\n        print(f'{i:>4}')\n\n\n\t# a comment\r\n",
        "\\boxed{\\frac{1}{2}} $x^2 + 1000000007$ 1,234,567.89",
    ],
)
def test_pairs_of_real_tokenizers_are_those_of_brute_force(text):
    check_alignment(text)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_pairs_of_any_text(text):
    check_alignment(text)


def trained(recipe, folder, **keys):
    """The steps of a laptop recipe, cut to two."""
    flags = [word for key, value in (QUICK | keys).items() for word in (f"--{key}", str(value))]
    command = ["train", str(RECIPES / "laptop" / f"{recipe}.yaml"), "--output_dir", str(folder), *flags]
    assert run(command) == 0
    steps = read_metrics(folder / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    return steps


def test_a_model_that_is_its_own_teacher_has_no_loss(tmp_path):
    name = real_model(SMOLLM2)
    pair = {"model_name_or_path": name, "teacher_model_name_or_path": name}
    steps = trained("same-origin", tmp_path / "run", **pair)
    assert all(step["loss/total"] == 0 and step["grad_norm"] == 0 for step in steps)
    assert all(step["representation/cosine"] == pytest.approx(1, abs=1e-6) for step in steps)


def test_a_pruned_student_is_paired_with_the_whole_model(tmp_path):
    name, pruned = real_model(SMOLLM2), tmp_path / "pruned"
    script = [sys.executable, str(ROOT / "examples" / "prune_blocks.py"), "--model", name, "--blocks", "10"]
    said = subprocess.run(
        [*script, "--data", "word-problems", "--output", str(pruned)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    layers = json.loads((pruned / "pruned.json").read_text())["layers"]
    assert f"layers: {layers}" in said
    keys = {"model_name_or_path": pruned, "teacher_model_name_or_path": name, "layers": layers}
    first, _ = trained("pruned", tmp_path / "run", **keys)
    at = {int(key.rpartition("_")[2]): first[key] for key in first if "cosine_layer" in key}
    assert at[min(at)] < 1 and sorted(at) == [int(pair.partition("=")[0]) for pair in layers.split(",")]


@pytest.fixture(scope="module", params=[SMOLLM2, GEMMA], ids=["SmolLM2", "Gemma"])
def across(request, tmp_path_factory):
    """A student, the teacher of another tokenizer, and the folder of a small bridge between them."""
    folder = tmp_path_factory.mktemp("bridge") / "fitted"
    pair = {"model_name_or_path": real_model(request.param), "teacher_model_name_or_path": real_model(QWEN)}
    small = pair | {"num_prompts": 48, "max_completion_length": 24, "batch_size": 24, "rank": 4}
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    recipe = str(RECIPES / "laptop" / "qwen-bridge.yaml")
    assert run(["bridge", recipe, "--output_dir", str(folder), *flags]) == 0
    return pair, folder


def test_states_through_a_bridge_of_another_tokenizer(across, tmp_path):
    pair, bridge = across
    report = json.loads((bridge / "report.json").read_text())
    assert report
    first, second = trained("through-qwen-bridge", tmp_path / "run", **pair, bridge=bridge)
    assert first["rollout/coverage"] > 0.8 and first["rollout/collapsed_alignment"] == 0
    assert first["representation/cosine"] > 0.5 and first["loss/anchor"] == 0
    assert second["loss/anchor"] > 0


def test_another_tokenizer_over_the_text(across, tmp_path):
    pair, _ = across
    for step in trained("qwen-text", tmp_path / "run", **pair):
        assert step["loss/output"] > 0 and step["grad_norm"] > 0
        assert step["rollout/coverage"] > 0.8
