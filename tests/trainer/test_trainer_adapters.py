"""LoRA and DoRA students from a recipe: saved alone and merged, resumed, read as models, refused."""

import json

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from merged import merged_weights
from oprd.foundation.errors import UserError
from oprd.foundation.meters import Stopwatch
from oprd.models.loading import load_model, load_tokenizer
from oprd.rollouts.engines import choose
from oprd.rollouts.engines.choose import choose_engine
from oprd.rollouts.engines.student import StudentEngine
from oprd.training.train import parse_training_recipe, train
from run_folders import lasting
from tiny_pair import QUICK, perturb, prompt_texts

KINDS = {"lora": [], "rslora": ["--use_rslora", "true"], "dora": ["--use_dora", "true"]}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, student, teacher):
    """`recipe(output_dir, *flags)`: the parsed recipe of a small run with adapters."""
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in prompt_texts(12)]
    (folder / "prompts.json").write_text(json.dumps(rows))
    names = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": str(folder / "prompts.json"),
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names))
    return lambda output_dir, *flags: parse_training_recipe(
        folder / "recipe.yaml", ["--output_dir", str(output_dir), *flags]
    )


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, recipe):
    """The folder of a finished run, and its flags."""
    flags = KINDS[request.param]
    return train(*recipe(tmp_path_factory.mktemp("runs") / request.param, *flags)), flags


def test_the_merged_model_ends_where_the_teacher_does(recipe, teacher, tmp_path):
    folder = tmp_path / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    model.generation_config.eos_token_id = [tokenizer.pad_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = train(*recipe(tmp_path / "run", "--teacher_model_name_or_path", str(folder)))
    ends = json.loads((done / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.pad_token_id, tokenizer.eos_token_id} <= set(ends)


def test_adapters_are_saved_alone_and_merged(run, student):
    folder, flags = run
    adapters = load_file(folder / "adapter_model.safetensors")
    assert adapters and all(".lora_" in name for name in adapters)
    assert not (folder / "model.safetensors").exists()
    wanted = merged_weights(folder, student, "--use_rslora" in flags)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").state_dict()
    read = load_model(str(folder)).state_dict()
    changed = AutoModelForCausalLM.from_pretrained(student).state_dict()
    for name, weight in wanted.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(merged[name], read[name])
        assert torch.equal(merged[name], changed[name]) is ("proj" not in name)


def test_a_resumed_run_equals_an_uninterrupted_one(run, recipe, tmp_path):
    folder, flags = run
    train(*recipe(tmp_path, *flags, "--max_steps", "1"))
    train(*recipe(tmp_path, *flags))
    assert lasting(tmp_path) == lasting(folder)
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        one, two = load_file(folder / name), load_file(tmp_path / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_target_modules", "q_proj", "lm_head"], "lm_head"),
        (["--lora_target_modules", "qproj"], "qproj"),
        (["--lora_r", "0"], "lora_r must be 1 or more, got 0"),
        (["--lora_dropout", "1"], r"lora_dropout must be 0 or more and below 1, got 1\.0"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_are_refused(recipe, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(*recipe(tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_adapters_of_a_tied_embedding_are_refused(recipe, tmp_path, make_folder):
    flags = ["--model_name_or_path", make_folder(1, tie_word_embeddings=True)]
    with pytest.raises(UserError, match="embedding has adapters and is tied to its LM head"):
        train(*recipe(tmp_path / "run", *flags, "--lora_target_modules", "q_proj", "embed_tokens"))


@pytest.fixture
def model(student):
    return AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def test_a_teacher_that_the_students_adapters_were_put_into(make_trainer, model):
    """The student starts away from it, is trained, and the teacher is the model without adapters."""
    before = weights_of(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    start = weights_of(adapted)
    trainer = make_trainer(student=adapted, teacher=model, max_steps=3)
    trainer.train()
    losses = [entry["loss/total"] for entry in trainer.state.log_history if "loss/total" in entry]
    assert losses[0] > 1e-4 and losses[-1] < losses[0]
    assert trainer.teacher.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.model.state_dict().items())
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, start[name])}
    assert moved and all(".lora_" in name for name in moved)
    assert all(weight.requires_grad for name, weight in adapted.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("shares", ["all", "one", "memory"])
def test_a_teacher_that_shares_parameters_with_the_student_is_copied(make_trainer, model, student, shares):
    teacher = model if shares == "all" else AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    if shares == "one":
        teacher.model.layers[0].mlp = model.model.layers[0].mlp
    elif shares == "memory":
        teacher.model.norm.weight.data = model.model.norm.weight.data
    trainer = make_trainer(student=model, teacher=teacher, output_loss="sampled_token", max_steps=1)
    assert all(weight.requires_grad for weight in trainer.model.parameters())
    assert not any(weight.requires_grad for weight in trainer.teacher.model.parameters())
    theirs, before = trainer.teacher.model.state_dict(), weights_of(teacher)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in theirs.items())


def test_a_student_of_which_nothing_is_trained_is_refused(make_trainer, model):
    with pytest.raises(UserError, match="the student has no parameter to train"):
        make_trainer(student=model.requires_grad_(False))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    with pytest.raises(UserError, match="the student has no parameter to train"):
        make_trainer(student=adapted, layers="1")


def test_adapters_are_no_student_but_a_teacher(run, recipe, tmp_path):
    folder, _ = run
    with pytest.raises(UserError, match="name its folder merged"):
        train(*recipe(tmp_path / "run", "--model_name_or_path", str(folder)))
    train(*recipe(tmp_path / "run", "--teacher_model_name_or_path", str(folder), "--max_steps", "1"))
    train(*recipe(tmp_path / "two", "--teacher_model_name_or_path", f"{folder}/merged", "--max_steps", "1"))
    assert lasting(tmp_path / "run") == lasting(tmp_path / "two")


def test_vllm_is_not_asked_for_adapters(run, monkeypatch):
    folder, _ = run
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    monkeypatch.setattr(choose, "is_installed", lambda: True)
    assert choose_engine("auto", None, model, tokenizer, str(folder)).name == "hf"
    with pytest.raises(UserError, match="name its folder merged"):
        choose_engine("vllm", None, model, tokenizer, str(folder))
    assert choose_engine("auto", None, model, tokenizer, f"{folder}/merged").name == "vllm"


def test_keys_of_adapters_without_adapters_are_refused(recipe, tmp_path):
    with pytest.raises(UserError, match="lora_alpha is of adapters, and use_peft is false"):
        train(*recipe(tmp_path / "run", "--use_peft", "false", "--lora_r", "16", "--use_dora", "true"))


def test_small_updates_outlive_a_model_stored_in_bfloat16(recipe, tmp_path, student):
    """Merged in bfloat16, an update a thousandth as large as the weights would be lost."""
    stored = tmp_path / "bfloat16"
    AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16).save_pretrained(stored)
    AutoTokenizer.from_pretrained(student).save_pretrained(stored)
    flags = ["--model_name_or_path", str(stored), "--learning_rate", "1e-5", "--max_steps", "1"]
    folder = train(*recipe(tmp_path / "run", *flags))
    base = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32).state_dict()
    merged = load_file(folder / "merged" / "model.safetensors")
    wanted = merged_weights(folder, stored, rslora=False, dtype=torch.float32)
    for name in (name for name in merged if "proj" in name):
        update = wanted[name] - base[name]
        assert (merged[name] - wanted[name]).norm() <= 0.01 * update.norm()
    card = (folder / "README.md").read_text()
    assert "oprd" in card and (folder / "merged" / "README.md").read_text() == card


class HandsOver:
    """As TRL hands adapters over, merged into the weights below them for as long as it takes."""

    mode, generation_kwargs = "server", {}

    def __init__(self, model):
        self.model = model

    def sync_weights(self):
        self.model.merge_adapter()
        self.model.unmerge_adapter()

    def generate(self):
        self.sync_weights()


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_weights_below_adapters_come_back_as_they_were(student, kind):
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **kind))
    perturb(model, seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    HandsOver(model).sync_weights()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.load_state_dict(before)
    generation = HandsOver(model)
    engine = StudentEngine(generation, Stopwatch(torch.device("cpu")), [2])
    for hand_over in (engine.sync_weights, generation.generate):
        engine.unchecked = False
        with torch.no_grad():
            hand_over()
        assert engine.unchecked
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
