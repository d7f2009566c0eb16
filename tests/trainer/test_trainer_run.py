"""Run folders of `oprd train`: metrics, resuming, refusals, faults, what a finished run leaves."""

import json
import logging
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from oprd.folders.checkpoints import last_whole_checkpoint
from oprd.folders.claims import is_finished
from oprd.folders.recorder import keep_steps, read_metrics
from oprd.folders.whole import SEAL_FILE
from oprd.foundation.errors import UserError
from oprd.training.train import train
from run_folders import files, lasting, same_weights

KEYS = {
    "step",
    "loss/total",
    "loss/representation",
    "loss/representation_layer_1",
    "loss/representation_layer_2",
    "representation/cosine",
    "representation/cosine_layer_1",
    "representation/cosine_layer_2",
    "rollout/mean_length",
    "rollout/truncated_share",
    "rollout/left_out",
    "rollout/representation_rows",
    "grad_norm",
    "learning_rate",
    "time/rollout_seconds",
    "time/teacher_seconds",
    "time/student_seconds",
    "time/optimizer_seconds",
    "memory/peak_mb",
    "memory/transient_mb",
}


def test_metrics_are_one_object_per_step(finished):
    records = read_metrics(finished / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record.keys() >= KEYS
        assert record["learning_rate"] == pytest.approx(1e-2)
        assert record["loss/total"] == pytest.approx(record["loss/representation"])
        layers = (record["loss/representation_layer_1"] + record["loss/representation_layer_2"]) / 2
        assert record["loss/representation"] == pytest.approx(layers)
        cosines = (record["representation/cosine_layer_1"] + record["representation/cosine_layer_2"]) / 2
        assert record["representation/cosine"] == pytest.approx(cosines)
        assert record["rollout/representation_rows"] == 4 * record["rollout/mean_length"]
        assert record["grad_norm"] > 0 and record["time/optimizer_seconds"] > 0


def test_final_folder_is_an_ordinary_model(finished, student, teacher):
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(student).chat_template
    logits = model(**tokenizer("What is 1?", return_tensors="pt")).logits
    assert logits.isfinite().all()
    card = (finished / "README.md").read_text()
    assert "OPRD" in card and teacher in card and "layers: all" in card
    resolved = yaml.safe_load((finished / "resolved.yaml").read_text())
    assert resolved["settings"]["model_name_or_path"] == student
    assert resolved["settings"]["teacher_model_name_or_path"] == teacher
    assert resolved["settings"]["positions"] == "last=2000"
    assert resolved["settings"]["learning_rate"] == 1e-2
    assert resolved["versions"].keys() >= {"oprd", "torch", "transformers", "trl", "python"}
    assert "git_commit" in resolved


@pytest.mark.parametrize("objective", [[], ["--output_loss", "sampled_token", "--optim", "sgd"]], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, recipe, finished, objective):
    whole = train(*recipe(tmp_path / "whole", *objective)) if objective else finished
    parts = tmp_path / "parts"
    train(*recipe(parts, *objective, "--max_steps", "2"))
    assert len(lasting(parts)) == 2
    train(*recipe(parts, *objective))
    assert lasting(parts) == lasting(whole)
    assert same_weights(parts, whole)


def test_a_run_may_be_resumed_in_other_micro_batches(tmp_path, recipe, finished):
    train(*recipe(tmp_path, "--max_steps", "2"))
    other = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    other += ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", "{every_n_layers: 2}"]
    train(*recipe(tmp_path, *other, "--keep_attention", "true", "--output_chunk_size", "7"))
    for one, two in zip(lasting(tmp_path), lasting(finished), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (tmp_path, finished)]
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-4, atol=1e-5)


def test_another_number_of_rollouts_per_step_is_refused(finished, recipe):
    with pytest.raises(UserError, match="a run of 4 rollouts per step, and this would be 8: keep"):
        train(*recipe(finished, "--per_device_train_batch_size", "4"))


def test_a_resumed_run_has_the_data_order_of_later_epochs(tmp_path, recipe):
    """12 prompts, 4 rollouts of each a step: step 13 begins the second epoch, step 15 is within the third."""
    objective = ["--num_generations", "4", "--per_device_train_batch_size", "2", "--max_steps", "30"]
    whole = train(*recipe(tmp_path / "whole", *objective))
    for step in (12, 15, 29):
        parts = Path(shutil.copytree(whole, tmp_path / f"parts-{step}"))
        (parts / SEAL_FILE).unlink()
        for later in range(step + 1, 31):
            shutil.rmtree(parts / f"checkpoint-{later}")
        train(*recipe(parts, *objective))
        assert lasting(parts) == lasting(whole), step
        assert same_weights(parts, whole), step


@pytest.mark.parametrize("fault", ["missing", "cut", "empty", "unsealed"])
def test_a_half_written_checkpoint_is_not_chosen(copied, recipe, finished, fault):
    """Killed while it wrote checkpoint-3, with a line of metrics cut short: it goes on from step 2."""
    (copied / SEAL_FILE).unlink()
    shutil.rmtree(copied / "checkpoint-4")
    file = copied / "checkpoint-3" / ("optimizer.pt" if fault != "unsealed" else SEAL_FILE)
    if fault in ("missing", "unsealed"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 * (fault == "cut")])
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert last_whole_checkpoint(copied) == copied / "checkpoint-2"
    train(*recipe(copied))
    assert lasting(copied) == lasting(finished)
    assert same_weights(copied, finished)


def test_a_folder_without_a_whole_checkpoint_starts_over(copied, recipe, finished):
    """Killed before its first one was whole."""
    for step in (2, 3, 4):
        shutil.rmtree(copied / f"checkpoint-{step}")
    for name in (SEAL_FILE, "model.safetensors", f"checkpoint-1/{SEAL_FILE}"):
        (copied / name).unlink()
    assert last_whole_checkpoint(copied) is None
    train(*recipe(copied))
    assert lasting(copied) == lasting(finished)
    assert same_weights(copied, finished)
    assert len(read_metrics(copied / "earlier-1" / "metrics.jsonl")) == 4


@pytest.mark.parametrize("fault", ["no seal", "alien seal", "no weights", "no state", "moved half-way"])
def test_a_final_model_of_which_something_is_missing_is_saved_again(copied, recipe, finished, fault):
    """From the checkpoint of the last step, without another step."""
    whole = files(copied)
    weights, state = copied / "model.safetensors", copied / "trainer_state.json"
    if fault == "no weights":
        weights.unlink()
    elif fault == "no state":
        state.unlink()
    elif fault == "alien seal":
        (copied / SEAL_FILE).write_text("[1, 2]")
    else:
        (copied / SEAL_FILE).unlink()
    if fault == "moved half-way":
        (copied / "final.partial").mkdir()
        state.rename(copied / "final.partial" / state.name)
    assert not is_finished(copied, 4)
    train(*recipe(copied))
    assert is_finished(copied, 4) and files(copied).keys() == whole.keys()
    assert lasting(copied) == lasting(finished)
    assert same_weights(copied, finished)


def test_the_trainer_itself_resumes_from_the_last_whole_checkpoint(make_trainer, tmp_path):
    keys = {"save_strategy": "steps", "save_steps": 1, "optim": "sgd"}
    make_trainer(max_steps=3, **keys).train(resume_from_checkpoint=True)  # there is none yet
    (tmp_path / "run" / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    resumed = make_trainer(max_steps=4, **keys)
    resumed.train(resume_from_checkpoint=True)
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert resumed.state.global_step == 4
    straight = make_trainer(max_steps=4, output_dir=str(tmp_path / "straight"), **keys)
    straight.train()
    for one, two in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_checkpoints_without_an_optimiser_are_not_resumed(tmp_path, recipe, finished, caplog):
    train(*recipe(tmp_path, "--save_only_model", "true"))
    for name in (SEAL_FILE, "model.safetensors"):
        (tmp_path / name).unlink()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()
    assert last_whole_checkpoint(tmp_path) is None
    for step, said in zip((4, 3, 2, 1), caplog.messages[-5:-1], strict=True):
        why = "it was saved with save_only_model, without the optimiser, and cannot be resumed from"
        assert said == f"{tmp_path}/checkpoint-{step} is passed over: {why}"
    assert caplog.messages[-1] == f"{tmp_path} holds no whole checkpoint: the run starts over"
    train(*recipe(tmp_path, "--save_only_model", "true"))
    assert same_weights(tmp_path / "earlier-1" / "checkpoint-4", finished)
    assert lasting(tmp_path) == lasting(finished)
    assert same_weights(tmp_path, finished)


def test_a_finished_run_is_left_alone(copied, recipe):
    before = files(copied)
    assert train(*recipe(copied)) == copied
    assert train(*recipe(copied, "--max_steps", "3", "--logging_steps", "2")) == copied
    assert files(copied) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", "last"),
        ("representation_loss", "cosine"),
        ("output_loss", "sampled_token"),
        ("learning_rate", "0.5"),
        ("seed", "1"),
        ("num_generations", "1"),
        ("model_name_or_path", "tiny:student"),
        ("teacher_model_name_or_path", "tiny:teacher"),
        ("dataset_name", "tiny"),
    ],
)
def test_another_run_in_the_folder_is_refused(finished, recipe, key, value):
    before = files(finished)
    with pytest.raises(UserError, match=rf"holds a run with {key}: .* choose another output_dir"):
        train(*recipe(finished, f"--{key}", value))
    assert files(finished) == before


def cosine(step, steps):
    """The learning rate of a step, from 1, of a run of so many."""
    return 1e-2 * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))


def test_more_steps_follow_the_schedule_of_the_longer_run(tmp_path, recipe, caplog):
    train(*recipe(tmp_path, "--lr_scheduler_type", "cosine", "--max_steps", "4"))
    train(*recipe(tmp_path, "--lr_scheduler_type", "cosine", "--max_steps", "8"))
    rates = [record["learning_rate"] for record in lasting(tmp_path)]
    expected = [cosine(step, 4) for step in range(1, 5)] + [cosine(step, 8) for step in range(5, 9)]
    assert rates == pytest.approx(expected, rel=1e-12)
    told = "from step 5 on the learning rate is that of a run of 8 steps; so far it was that of 4"
    assert told in caplog.messages


@pytest.mark.parametrize(("epochs", "steps"), [("0.5", 3), ("1.1", 7)])
def test_epochs_are_passes_over_the_prompts(tmp_path, recipe, monkeypatch, epochs, steps):
    """12 prompts, 2 of them a step: an epoch has 6 steps."""
    flags = ["--max_steps", "-1", "--num_train_epochs", epochs, "--lr_scheduler_type", "cosine"]
    train(*recipe(tmp_path, *flags))
    assert [record["learning_rate"] for record in lasting(tmp_path)] == pytest.approx(
        [cosine(step, steps) for step in range(1, steps + 1)], rel=1e-12
    )
    shutil.rmtree(tmp_path / f"checkpoint-{steps}")
    before = files(tmp_path)
    monkeypatch.setattr("oprd.training.train._make_trainer", None)  # known to be finished without the models
    train(*recipe(tmp_path, *flags))
    assert files(tmp_path) == before
    with pytest.raises(UserError, match=f"after {steps} steps, and the checkpoint of its last step is gone"):
        train(*recipe(tmp_path, *flags[:-3], "2", *flags[-2:]))


def test_steps_and_epochs_are_not_both_asked_for(tmp_path, recipe):
    with pytest.raises(UserError, match="max_steps: 4 and num_train_epochs: 1 both say how long"):
        recipe(tmp_path, "--num_train_epochs", "1")


@pytest.mark.parametrize("key", ["model_name_or_path", "teacher_model_name_or_path", "dataset_name"])
@pytest.mark.parametrize("more", [[], ["--max_steps", "6"]], ids=["finished", "longer"])
def test_what_was_replaced_in_place_is_refused(copied, recipe, tmp_path, key, more):
    """A run of copies is the same run, until one of them is edited."""
    run, config = recipe(copied)
    named = getattr(run, key, None) or getattr(config, key)
    copy = tmp_path / Path(named).name
    flags = [f"--{key}", str(copy)]
    if key == "dataset_name":
        shutil.copy(named, copy)
        train(*recipe(copied, *flags))
        copy.write_text(copy.read_text().replace("What is 3", "What was 3"))
    else:
        shutil.copytree(named, copy)
        train(*recipe(copied, *flags))
        weights = load_file(copy / "model.safetensors")
        weights["lm_head.weight"][0, 0] += 1
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    resolved = copied / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace(f"{key}: {named}", f"{key}: {copy}"))
    before = files(copied)
    with pytest.raises(UserError, match=rf"holds a run whose {key}: {copy} has been changed since \("):
        train(*recipe(copied, *flags, *more))
    assert files(copied) == before


def test_a_damaged_resolved_file_is_a_users_error(copied, recipe):
    (copied / "resolved.yaml").write_text("settings: [unclosed")
    with pytest.raises(UserError, match=r"resolved\.yaml"):
        train(*recipe(copied))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "missing.jsonl"], "missing.jsonl"),
        (["--model_name_or_path", "./missing"], "./missing does not exist"),
        (["--teacher_model_name_or_path", "tiny:nonsense"], "tiny:nonsense"),
        (["--layers", "3"], "layers='3'"),
    ],
)
def test_nothing_is_written_on_a_users_error(tmp_path, recipe, flags, message):
    with pytest.raises(UserError, match=message):
        train(*recipe(tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_an_output_dir_that_cannot_be_written_is_a_users_error(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"file/run cannot be written to .*Not a directory"):
        train(*recipe(tmp_path / "file" / "run"))
    assert files(tmp_path) == before


def test_keep_steps_drops_later_and_cut_lines(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    keep_steps(path, 0)
    assert path.read_text() == ""
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    keep_steps(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# Faults of a run


class PoisonTeacher(TrainerCallback):
    def __init__(self, trainer_module, step, name, value):
        self.module, self.step, self.name, self.value = trainer_module, step, name, value

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.module.get_parameter(self.name).view(-1)[0] = self.value


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("settings", "weight", "where"),
    [
        ({}, "model.layers.1.mlp.down_proj.weight", r"at layers \[2\]"),
        ({}, "model.layers.0.mlp.down_proj.weight", r"at layers \[1, 2\]"),
        ({"output_loss": "full_vocab", "representation_weight": "0"}, "lm_head.weight", "output loss"),
    ],
    ids=["layer 2", "layer 1", "head"],
)
def test_a_loss_that_is_not_finite_stops_the_run(make_trainer, tmp_path, value, settings, weight, where):
    trainer = make_trainer(save_strategy="steps", save_steps=1, max_steps=5, **settings)
    trainer.add_callback(PoisonTeacher(trainer.teacher.model, 2, weight, value))
    with pytest.raises(RuntimeError, match=rf"step 3: .*{where}.*in rollouts of .*What is") as caught:
        trainer.train()
    assert not isinstance(caught.value, UserError)
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_poisoned_teacher_folder_stops_oprd_train(tmp_path, recipe, teacher):
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    broken = r"the weights of the teacher are not finite: model\.layers\.1\.mlp\.down_proj\.weight"
    with pytest.raises(UserError, match=broken):
        train(*recipe(tmp_path / "run", "--teacher_model_name_or_path", str(folder)))
    assert not (tmp_path / "run").exists()


def poison(trainer, at_step):
    """Let the update of a step leave infinity in the student's second block."""

    def observe(step, _):
        if step == at_step:
            trainer.model.model.layers[1].mlp.up_proj.weight.data[2, 3] = math.inf
        return {}

    trainer.recorder.observers.append(observe)


def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    poison(trainer, at_step=2)
    with pytest.raises(RuntimeError, match=r"step 2: .*not finite \(model\.layers\.1\.mlp\.up_proj\.weight"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-1"
    with pytest.raises(RuntimeError, match="step 2: the student's weights are not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_student_that_broke_is_told_by_its_next_rollouts(make_trainer):
    trainer = make_trainer()
    poison(trainer, at_step=1)
    with pytest.raises(RuntimeError, match=r"step 2: the student's logits.*layers\.1\.mlp\.up_proj\.weight"):
        trainer.train()


def test_a_gradient_that_is_not_finite_stops_the_run_unapplied(make_trainer):
    trainer = make_trainer()
    before = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer.model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RuntimeError, match="step 1: the gradient is not finite"):
        trainer.train()
    assert torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight, before)


def test_a_scaler_skips_a_step_whose_gradient_is_not_finite(make_trainer):
    """In float16 gradients overflow from time to time, and are scaled less from then on."""
    trainer = make_trainer()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    assert trainer._get_grad_norm(trainer.model, grad_norm=torch.tensor(math.inf)) == math.inf
    trainer.recorder.on_step_end(trainer.args, trainer.state, trainer.control)
    (line,) = (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert "learning_rate" in json.loads(line) and "grad_norm" not in json.loads(line)


@pytest.mark.parametrize(("dropout", "off"), [(0.1, False), (0.1, True), (0.0, False)])
def test_a_student_with_dropout_is_told_of_it(make_trainer, make_folder, caplog, dropout, off):
    sizes = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": dropout,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    folder = make_folder(1, family="gpt2", **sizes)
    with caplog.at_level("WARNING"):
        make_trainer(student=folder, teacher=folder, disable_dropout=off)
    assert ("learns with dropout" in caplog.text) == (dropout > 0 and not off)


def test_a_run_from_python_says_what_it_is(make_trainer, tmp_path, caplog):
    """`resolved.yaml` of its settings, the line before the first rollout, and no warning of old names."""
    with (
        warnings.catch_warnings(),
        caplog.at_level(logging.INFO, "oprd"),
    ):
        warnings.simplefilter("error", FutureWarning)
        make_trainer(gradient_checkpointing=True, save_strategy="steps", save_steps=1).train()
        make_trainer(gradient_checkpointing=True, layers="last").train()
    resolved = yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())
    settings = resolved["settings"]
    assert settings["layers"] == "last" and settings["gradient_checkpointing"] is True
    assert settings["num_processes"] == 1 and Path(settings["model_name_or_path"]).is_dir()
    assert {"trl", "transformers", "oprd"} <= resolved["versions"].keys()
    told = [message for message in caplog.messages if " rollouts (" in message]
    assert told[-1] == (
        "2 steps of 4 rollouts (4 prompts × 1) of up to 8 tokens, by Hugging Face's generate; "
        f"mse (1 layer, rows last=2000); float32 on cpu; writes to {tmp_path / 'run'}"
    )
