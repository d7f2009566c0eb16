"""Fingerprints of models and tokenizers: what changes them and what does not."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from oprd.bridge import Bridge
from oprd.bridge.artifact import Projector
from oprd.bridge.identity import (
    check_models,
    identity,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from oprd.foundation.errors import UserError
from oprd.models.tiny import tokenizer as designs
from oprd.models.tiny.tokenizer import train_tokenizer

WORDS = ["a few words to merge, a few words more"] * 9


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS, vocab_size=280)


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize("tied", [False, True])
def test_one_checkpoint_in_any_dtype_that_holds_it(tiny_model, tmp_path, family, tied):
    tiny_model(family, tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = [load(tmp_path, dtype=dtype) for dtype in ("bfloat16", "float32", "float64")]
    expected = weights_fingerprint(loaded[0])
    assert [weights_fingerprint(model) for model in loaded] == [expected] * 3
    loaded[1].save_pretrained(tmp_path / "again")
    assert weights_fingerprint(load(tmp_path / "again", dtype="float32")) == expected
    assert len(expected) == 16 and int(expected, 16)


def test_a_model_made_in_memory_is_the_one_it_is_saved_as(tiny_model, tmp_path):
    model = tiny_model()
    expected = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert weights_fingerprint(model) == weights_fingerprint(load(tmp_path)) == expected


def test_how_a_model_is_run_does_not_count(tiny_model):
    model = tiny_model()
    expected = weights_fingerprint(model)
    model.config.use_cache, model.config._name_or_path = False, "elsewhere"
    model.train().requires_grad_(False)
    model.generation_config.temperature = 0.3
    assert weights_fingerprint(model) == expected


def test_special_tokens_do_not_count(tiny_model):
    """A trainer sets them to the tokenizer's before it meets the bridge."""
    model = tiny_model("qwen3")
    before = weights_fingerprint(model)
    for name, token in (("pad_token_id", 5), ("bos_token_id", None), ("eos_token_id", [2, 7])):
        setattr(model.config, name, token)
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_counts(tiny_model, tied):
    model = tiny_model(tie_word_embeddings=tied)
    seen = {weights_fingerprint(model)}
    parameters = dict(model.named_parameters())
    assert ("lm_head.weight" in parameters) is not tied
    for parameter in parameters.values():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.02)
        seen.add(weights_fingerprint(model))
        with torch.no_grad():
            parameter.copy_(before)
    assert len(seen) == len(parameters) + 1


def test_large_weights_are_sampled_to_their_end(tiny_model):
    """A thousandth of the values of a weight, changed in one block, is noticed wherever the block lies."""
    model = tiny_model(vocab_size=6000)
    weight = model.model.embed_tokens.weight.data.view(-1)
    expected, block = weights_fingerprint(model), len(weight) // 1000
    for start in range(0, len(weight) - block, 97 * block):
        weight[start : start + block] += 1
        assert weights_fingerprint(model) != expected
        weight[start : start + block] -= 1
    weight[-block:] += 1
    assert weights_fingerprint(model) != expected


def test_weights_may_not_swap_places(tiny_model):
    model = tiny_model()
    expected = weights_fingerprint(model)
    first, second = (model.model.layers[i].mlp.up_proj.weight for i in (0, 1))
    with torch.no_grad():
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    assert weights_fingerprint(model) != expected


@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 1e-5), ("num_key_value_heads", 2), ("hidden_act", "gelu"), ("rope_theta", 5e5)],
)
def test_the_config_counts(tiny_model, key, value):
    model = tiny_model()
    other = tiny_model(**{key: value})
    if key != "num_key_value_heads":
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert weights_fingerprint(model) != weights_fingerprint(other)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_adapters_do_not_count(tiny_model, tokenizer, settings):
    model = tiny_model()
    expected = identity(model, tokenizer)
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(1.0 if parameter.requires_grad else 0.0)
    assert identity(adapted, tokenizer) == expected
    base = adapted.get_base_model().model.layers[1].mlp.down_proj
    getattr(base, "base_layer", base).weight.data.add_(1.0)
    assert identity(adapted, tokenizer)["weights"] != expected["weights"]


def test_merged_adapters_do_count(tiny_model):
    model = tiny_model()
    expected = weights_fingerprint(model)
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    assert weights_fingerprint(get_peft_model(model, lora).merge_and_unload()) != expected


def test_tokenizers(tokenizer, tmp_path):
    expected = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(None) is None
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(type(tokenizer).from_pretrained(tmp_path)) == expected
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = "another"
    assert tokenizer_fingerprint(templated) == expected
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<|extra|>"])
    smaller = train_tokenizer(WORDS, vocab_size=270)
    other = train_tokenizer(WORDS, vocab_size=280, design=designs.PAIRS)
    prints = {tokenizer_fingerprint(t) for t in (longer, smaller, other)}
    assert len(prints) == 3 and expected not in prints


def test_an_identity_names_the_model(tiny_model, tokenizer, tmp_path):
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert identity(model, tokenizer) == {
        "name": str(tmp_path),
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "width": 16,
        "weights": weights_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }


# Checking


def found(width, num_layers, **changes):
    same = {"name": "it", "architecture": "A", "weights": "w", "tokenizer": "t"}
    return {"width": width, "num_layers": num_layers} | same | changes


def joined(metadata=None):
    """A bridge of student layers 1 and 3, 5 wide, and teacher layers 2 and 6, 7 wide."""
    shapes = (2, 5), (2,), (2, 7), (7,)
    pairs = {1: 2, 3: 6}
    projectors = {s: Projector(t, *(torch.zeros(shape) for shape in shapes)) for s, t in pairs.items()}
    return Bridge(projectors, metadata or {})


def test_a_bridge_of_these_models():
    check_models(joined(), found(5, 3), found(7, 6))
    stored = {"student": found(5, 3, name="s"), "teacher": found(7, 6, name="t")}
    check_models(joined(stored), found(5, 3), found(7, 6))


@pytest.mark.parametrize(
    ("student", "teacher", "says"),
    [
        ((6, 3), (7, 6), "layer 1, 5 wide, of a student, but this student has 3 layers 6 wide"),
        ((5, 2), (7, 6), "layer 3, 5 wide, of a student, but this student has 2 layers 5 wide"),
        ((5, 3), (8, 6), "layer 2, 7 wide, of a teacher, but this teacher has 6 layers 8 wide"),
        ((5, 3), (7, 5), "layer 6, 7 wide, of a teacher, but this teacher has 5 layers 7 wide"),
        ((7, 6), (5, 3), "5 wide, of a student, but this student has 6 layers 7 wide"),
    ],
)
def test_sizes_alone_are_checked_without_identities(student, teacher, says):
    with pytest.raises(UserError, match=says):
        check_models(joined(), found(*student), found(*teacher))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("architecture", "B"), ("weights", "v"), ("tokenizer", "u"), ("tokenizer", None), ("num_layers", 9)],
)
def test_another_model_is_refused(role, key, value):
    models = {"student": found(5, 3), "teacher": found(7, 6)}
    stored = {name: model | {"name": f"the {name}"} for name, model in models.items()}
    models[role] |= {key: value}
    says = rf"for the {role} the {role} and this is it \({key}: .*, here {value}"
    with pytest.raises(UserError, match=says):
        check_models(joined(stored), models["student"], models["teacher"])
