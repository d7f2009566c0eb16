"""What an update must not run, must not train, and how often it may run the teacher."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from spies import Calls, refuse, refuse_updates

UPDATE = {"max_steps": 2, "optim": "adamw_torch", "weight_decay": 0.1}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_head_runs_without_an_output_loss(make_trainer, checkpointing):
    trainer = make_trainer(gradient_checkpointing=checkpointing, diagnostics_steps=0, **UPDATE)
    trainer.teacher.model.lm_head.register_forward_pre_hook(refuse)
    refuse_updates(trainer, trainer.model.lm_head)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_refusal_works(make_trainer):
    trainer = make_trainer(**UPDATE)
    refuse_updates(trainer, trainer.model.model.layers[0])
    with pytest.raises(AssertionError, match="must not run"):
        trainer.train()


@pytest.mark.parametrize("layers", ["1", "2=1", "1=2"])
def test_models_run_no_deeper_than_needed(make_trainer, layers):
    trainer = make_trainer(layers=layers, **UPDATE)
    student_layer, teacher_layer = trainer.update.layer_map.pairs[0]
    teacher = trainer.teacher.model
    for block in [*teacher.model.layers[teacher_layer:], teacher.lm_head]:
        block.register_forward_pre_hook(refuse)
    if teacher_layer < 2:
        teacher.model.norm.register_forward_pre_hook(refuse)
    for block in [*trainer.model.model.layers[student_layer:], trainer.model.lm_head]:
        refuse_updates(trainer, block)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({}, ["lm_head"]),
        ({"layers": "1"}, ["lm_head", "model.layers.1", "model.norm"]),
        ({"layers": "last", "final_norm": False}, ["lm_head", "model.norm"]),
        ({"output_loss": "sampled_token"}, []),
        (
            {"output_loss": "sampled_token", "layers": "1", "output_weight": "0"},
            ["lm_head", "model.layers.1", "model.norm"],
        ),
        ({"output_loss": "sampled_token", "output_weight": "0=0,1=1"}, []),
    ],
    ids=str,
)
def test_what_no_term_reaches_is_frozen(make_trainer, settings, frozen):
    trainer = make_trainer(**settings, **UPDATE)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    grouped = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    with_state = {id(p) for p in trainer.optimizer.state}
    for name, parameter in trainer.model.named_parameters():
        untouched = name.startswith(tuple(frozen)) if frozen else False
        assert parameter.requires_grad is not untouched, name
        assert (id(parameter) in grouped) is not untouched, name
        assert torch.equal(parameter, before[name]) is untouched, name
        assert not untouched or id(parameter) not in with_state, name


def test_tied_head_is_said_and_trained(make_trainer, make_folder, caplog):
    tied = make_folder(1, tie_word_embeddings=True)
    trainer = make_trainer(student=tied, teacher=make_folder(2, tie_word_embeddings=True), **UPDATE)
    assert "LM head is tied to its input embedding" in caplog.text
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_a_tied_head_that_stays_is_not_said_to_move(make_trainer, make_folder, caplog):
    tied = make_folder(1, tie_word_embeddings=True)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    make_trainer(student=tied, teacher=make_folder(2, tie_word_embeddings=True), extra={"peft_config": lora})
    student = AutoModelForCausalLM.from_pretrained(tied)
    student.get_input_embeddings().requires_grad_(False)
    make_trainer(student=student)
    assert "tied" not in caplog.text


def test_untied_head_is_not_said_to_be_tied(make_trainer, caplog):
    make_trainer()
    assert "tied" not in caplog.text


@pytest.mark.parametrize("layers", ["all", "last", "1"])
def test_one_teacher_forward_serves_both_terms(make_trainer, layers):
    trainer = make_trainer(
        layers=layers,
        output_loss="top_k",
        positions="last=2",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
    )
    calls = [Calls(trainer.teacher.model.model), *map(Calls, trainer.teacher.model.model.layers)]
    trainer.train()
    assert [call.count for call in calls] == [3 * 2] * 3


def test_a_representation_phase_then_an_output_phase(make_trainer):
    """Weights 1, 1, ½, 0 and 0, 0, ½, 1: a term without weight costs and reports nothing."""
    trainer = make_trainer(
        representation_weight="0=1,1=1,3=0",
        output_weight="0=0,1=0,3=1",
        output_loss="full_vocab",
        max_steps=4,
    )
    early = lambda: trainer.state.global_step < 2  # noqa: E731
    refuse_updates(trainer, trainer.model.lm_head, early)
    trainer.teacher.model.lm_head.register_forward_pre_hook(lambda *_: refuse() if early() else None)
    head = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, head)
    log = [entry for entry in trainer.state.log_history if "loss/total" in entry]
    shares = [(1, 0), (1, 0), (0.5, 0.5), (0, 1)]
    for entry, (representation, output) in zip(log, shares, strict=True):
        assert ("loss/representation" in entry) is (representation > 0)
        assert ("representation/cosine" in entry) is (representation > 0)
        assert ("loss/output" in entry) is (output > 0)
        assert ("output/student_entropy" in entry) is (output > 0)
        parts = representation * entry.get("loss/representation", 0) + output * entry.get("loss/output", 0)
        assert entry["loss/total"] == pytest.approx(parts, rel=1e-6)


def test_bf16_computes_in_bf16_and_reduces_in_float32(make_trainer):
    trainer = make_trainer(bf16=True, output_loss="full_vocab")
    assert trainer.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
    kinds = {"student": set(), "teacher": set()}
    updating = []
    watched = {
        "student": trainer.model.model.layers[0].self_attn.q_proj,
        "teacher": trainer.teacher.model.model.layers[0].self_attn.q_proj,
    }
    for name, module in watched.items():
        module.register_forward_hook(
            lambda m, a, out, name=name: kinds[name].add(out.dtype) if updating else None
        )
    loss_of, dtypes = trainer._one_loss, set()

    def watch(model, inputs):
        updating.append(True)
        loss = loss_of(model, inputs)
        updating.pop()
        dtypes.add(loss.dtype)
        return loss

    trainer._one_loss = watch
    trainer.train()
    assert kinds["student"] == kinds["teacher"] == {torch.bfloat16}
    assert dtypes == {torch.float32}


def test_teacher_keeps_its_own_dtype(make_trainer, roll_out):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(teacher_model_init_kwargs={"dtype": "bfloat16"})
    seen = set()
    trainer.teacher.model.model.layers[0].mlp.register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    loss = trainer.compute_loss(trainer.model, roll_out(trainer))
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32 and loss.isfinite()
    assert AutoModelForCausalLM.from_pretrained(trainer.model.config._name_or_path).dtype == torch.float32
