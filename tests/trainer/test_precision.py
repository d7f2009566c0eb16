"""A student that equals its teacher stays where it is, whatever the run computes in."""

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoModelForCausalLM

from oprd.models.padding import heeds_padding
from oprd.models.precision import Precision, store_products_in

OBJECTIVES = {
    "mse": {},
    "relative_mse": {"representation_loss": "relative_mse"},
    "sampled_token": {"representation_weight": "0", "output_loss": "sampled_token"},
    "top_k": {"representation_weight": "0", "output_loss": "top_k"},
    "jsd": {"representation_weight": "0", "output_loss": "full_vocab", "divergence": "jsd"},
    "both": {"output_loss": "full_vocab"},
}
FAMILIES = {
    "qwen3": {},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 16},  # scales its embeddings
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # Conv1D, learned positions
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},  # experts in one tensor
}


@pytest.fixture
def stored_in(make_folder, tmp_path, tokenizer):
    """A model's folder with its weights in another dtype."""

    def store(dtype, family="qwen3"):
        folder = tmp_path / f"{family}-{dtype}".replace("torch.", "")
        model = AutoModelForCausalLM.from_pretrained(make_folder(1, family, **FAMILIES[family]))
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return store


def stays(trainer, batch, gradient):
    loss, slope = gradient(trainer, batch)
    assert loss == 0 and not slope.any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_an_equal_teacher_gives_zero(
    make_trainer, roll_out, gradient, stored_in, stored, objective
):
    folder = stored_in(stored)
    trainer = make_trainer(student=folder, teacher=folder, bf16=True, **OBJECTIVES[objective])
    assert trainer.model.dtype == torch.float32
    stays(trainer, roll_out(trainer), gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_an_equal_teacher_of_any_family_gives_zero(
    make_trainer, roll_out, gradient, stored_in, family
):
    folder = stored_in(torch.bfloat16, family)
    settings = {"bf16": True, "disable_dropout": True} | OBJECTIVES["both"]
    trainer = make_trainer(student=folder, teacher=folder, **settings)
    batch = roll_out(trainer)
    stays(trainer, batch, gradient)
    half = {"dtype": "bfloat16"}
    rounded = make_trainer(student=folder, teacher=folder, teacher_model_init_kwargs=half, **settings)
    assert gradient(rounded, batch)[0] > 0  # what the run would have without it


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_in_half_precision_gives_zero(make_trainer, roll_out, gradient, stored_in, stored, bf16):
    folder = stored_in(stored)
    half = {"model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make_trainer(student=folder, teacher=folder, bf16=bf16, **half, **OBJECTIVES["both"])
    assert trainer.model.dtype == trainer.teacher.model.dtype == torch.bfloat16
    stays(trainer, roll_out(trainer), gradient)


@pytest.mark.parametrize("offload", [False, True])
def test_adapters_and_an_offloaded_teacher_give_zero(make_trainer, roll_out, gradient, stored_in, offload):
    from peft import LoraConfig

    folder = stored_in(torch.bfloat16)
    trainer = make_trainer(
        student=folder,
        teacher=folder,
        bf16=True,
        teacher_offload=offload,
        extra={"peft_config": LoraConfig(r=2, target_modules="all-linear")},
        **OBJECTIVES["both"],
    )
    stays(trainer, roll_out(trainer), gradient)


def test_an_offloaded_teacher_in_float32_gives_zero(make_trainer, roll_out, gradient, stored_in):
    """As on a machine without an accelerator: its weights are on no device when the trainer tries it."""
    folder = stored_in(torch.float32)
    trainer = make_trainer(student=folder, teacher=folder, teacher_offload=True, **OBJECTIVES["both"])
    assert trainer.teacher.model.device.type == "meta"
    stays(trainer, roll_out(trainer), gradient)


def test_an_equal_student_does_not_move_in_steps(make_trainer, stored_in):
    folder = stored_in(torch.bfloat16)
    trainer = make_trainer(
        student=folder, teacher=folder, bf16=True, representation_loss="relative_mse", max_steps=3
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    losses = [entry["loss/total"] for entry in trainer.state.log_history if "loss/total" in entry]
    assert losses == [0.0] * 3
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_the_teachers_products_rest_in_the_files_precision(make_trainer, stored_in):
    folder = stored_in(torch.bfloat16)
    model = make_trainer(student=folder, teacher=folder, bf16=True).teacher.model
    block = model.model.layers[0]
    assert block.self_attn.q_proj.weight.dtype == block.mlp.up_proj.weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == block.input_layernorm.weight.dtype == torch.float32


def test_a_deeper_teacher_of_the_same_kind_computes_like_the_student(
    make_trainer, roll_out, gradient, make_folder, tokenizer, tmp_path
):
    deep = AutoModelForCausalLM.from_pretrained(make_folder(2, num_hidden_layers=3)).bfloat16()
    deep.save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    trainer = make_trainer(teacher=str(tmp_path / "deep"), bf16=True, **OBJECTIVES["both"])
    read = trainer.teacher.model
    assert read.dtype == torch.float32 and read.model.layers[2].mlp.up_proj.weight.dtype == torch.bfloat16
    assert heeds_padding(read)
    assert 0 < gradient(trainer, roll_out(trainer))[0] < float("inf")


def test_a_weight_that_half_precision_would_round_is_left(make_folder):
    model = AutoModelForCausalLM.from_pretrained(make_folder(1))
    exact, rounded = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    exact.weight.data = exact.weight.data.bfloat16().float()
    values = rounded.weight.detach().clone()
    store_products_in(torch.bfloat16, model)
    assert exact.weight.dtype == torch.bfloat16
    assert rounded.weight.dtype == torch.float32 and torch.equal(rounded.weight, values)


def test_another_kind_of_teacher_keeps_its_files_precision(make_folder):
    def config(family, **sizes):
        return AutoConfig.for_model(family, **sizes)

    narrow = Precision(config("qwen3", hidden_size=32), torch.float32, autocast=True)
    assert narrow.of_teacher(config("qwen3", hidden_size=32)) == torch.float32
    assert narrow.of_teacher(config("qwen3", hidden_size=64)) == "auto"
    assert narrow.of_teacher(config("llama", hidden_size=32)) == "auto"
    assert narrow.of_teacher(config("qwen3", hidden_size=32), is_quantized=True) == "auto"
    whole = Precision(config("qwen3", hidden_size=32), torch.float32, autocast=False)
    assert whole.of_teacher(config("llama", hidden_size=64)) == torch.float32


@pytest.mark.parametrize(
    ("distributed", "weights", "autocast"),
    [
        (DistributedType.NO, torch.float32, True),
        (DistributedType.MULTI_GPU, torch.float32, True),
        (DistributedType.FSDP, torch.bfloat16, True),  # whose policy casts weights and inputs of blocks
        (DistributedType.DEEPSPEED, torch.bfloat16, False),
    ],
)
def test_who_casts_the_students_weights(make_trainer, make_folder, distributed, weights, autocast):
    args = make_trainer(bf16=True).args
    student = AutoModelForCausalLM.from_pretrained(make_folder(1))
    found = Precision.of(student, args, distributed)
    assert (found.weights, found.autocast) == (weights, autocast)


def test_a_teacher_that_was_asked_to_round_is_told(make_trainer, caplog):
    make_trainer(bf16=True, teacher_model_init_kwargs={"dtype": "bfloat16"})
    assert "the teacher computes in bfloat16 and the student in float32" in caplog.text
    caplog.clear()
    make_trainer(bf16=True)
    assert "the teacher computes in" not in caplog.text
