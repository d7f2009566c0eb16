"""What a step reports, by hand; diagnostics, trackers, evaluation, adapters; the seams of TRL we rely on."""

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

import by_hand
from oprd.rollouts.rows import RolloutBatch
from tiny_pair import prompt_texts

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def statistics_by_hand(student, teacher, given, k=16):
    """Mean entropies and top-k overlap over all response rows."""
    entropies: dict[str, list[float]] = {"student": [], "teacher": []}
    overlaps = []
    with torch.no_grad():
        for prompt, completion, _ in given:
            logits = [by_hand.states_and_logits(m, prompt, completion)[1] for m in (student, teacher)]
            for name, rows in zip(entropies, logits, strict=True):
                p = rows.softmax(-1)
                entropies[name] += (-(p * p.log()).sum(-1)).tolist()
            for ours, theirs in zip(*logits, strict=True):
                shared = set(ours.topk(k).indices.tolist()) & set(theirs.topk(k).indices.tolist())
                overlaps.append(len(shared) / k)
    mean = {f"output/{name}_entropy": sum(v) / len(v) for name, v in entropies.items()}
    return mean | {"output/top_k_overlap": sum(overlaps) / len(overlaps)}


def cosines_by_hand(student, teacher, given):
    with torch.no_grad():
        return {
            layer: 1 - by_hand.representation_loss(student, teacher, given, [(layer, layer)], "cosine").item()
            for layer in (1, 2)
        }


def popped(trainer):
    return trainer.update.averages.pop(lambda values: values)


@pytest.mark.parametrize("split", [[6], [4, 2], [1, 5]], ids=str)
def test_metrics_of_a_step_by_hand(make_trainer, roll_out, split):
    trainer = make_trainer(output_loss="top_k", student_temperature=2.0, representation_weight="3")
    batch = roll_out(trainer)
    start = 0
    for count in split:
        rows = slice(start, start + count)
        part = {key: value[rows] if value.ndim else value for key, value in batch.items()}
        trainer.compute_loss(trainer.model, part)
        start += count
    metrics = popped(trainer)
    given, models = by_hand.rollouts(batch), (trainer.model, trainer.teacher.model)
    cosines = cosines_by_hand(*models, given)
    for layer, value in cosines.items():
        assert metrics[f"representation/cosine_layer_{layer}"] == pytest.approx(value, rel=1e-5)
        loss = by_hand.representation_loss(*models, given, [(layer, layer)]).item()
        assert metrics[f"loss/representation_layer_{layer}"] == pytest.approx(loss, rel=1e-5)
    assert metrics["representation/cosine"] == pytest.approx(sum(cosines.values()) / 2, rel=1e-5)
    for name, value in statistics_by_hand(*models, given).items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    total = 3 * metrics["loss/representation"] + metrics["loss/output"]
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-5)
    lengths = [len(completion) for _, completion, _ in given]
    assert metrics["rollout/mean_length"] == pytest.approx(sum(lengths) / 6)
    assert metrics["rollout/representation_rows"] == metrics["rollout/output_rows"] == sum(lengths)
    assert popped(trainer) == {}


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, ["representation"]),
        ({"output_loss": "sampled_token"}, ["representation", "output"]),
        ({"output_loss": "sampled_token", "output_weight": "0"}, ["representation"]),
        ({"output_loss": "top_k", "representation_weight": "0"}, ["output"]),
        ({"output_loss": "top_k", "output_weight": "0=0,9=1"}, ["representation", "output"]),
    ],
    ids=str,
)
def test_rows_are_logged_of_terms_that_are_ever_active(make_trainer, roll_out, settings, terms):
    trainer = make_trainer(**settings)
    batch = roll_out(trainer)
    rows = {name: value for name, value in popped(trainer).items() if name.endswith("_rows")}
    count = batch["completion_mask"].sum().item()
    assert rows == {f"rollout/{term}_rows": count for term in terms}


def test_a_mean_over_all_layers_of_an_empty_micro_batch(make_trainer, roll_out):
    """A micro-batch without a supervised row adds nothing: no cosine of 0, no NaN."""
    trainer = make_trainer(output_loss="full_vocab")
    batch = roll_out(trainer)
    batch["representation_weights"].zero_()
    batch["output_weights"].zero_()
    popped(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = popped(trainer)
    assert loss.item() == 0
    assert not any(name.startswith(("representation/", "output/")) for name in metrics)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_diagnostics_measure_what_the_loss_does_not_show(make_trainer, roll_out, checkpointing):
    trainer = make_trainer(
        diagnostics_steps=1, per_device_train_batch_size=6, gradient_checkpointing=checkpointing
    )
    given = by_hand.rollouts(roll_out(trainer))
    metrics = popped(trainer)
    expected = statistics_by_hand(trainer.model, trainer.teacher.model, given)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not any(name.startswith(("loss/", "representation/")) for name in metrics)

    trainer = make_trainer(
        diagnostics_steps=1,
        per_device_train_batch_size=6,
        representation_weight="0",
        output_loss="sampled_token",
        gradient_checkpointing=checkpointing,
    )
    given = by_hand.rollouts(roll_out(trainer))
    metrics = popped(trainer)
    cosines = cosines_by_hand(trainer.model, trainer.teacher.model, given)
    for layer, value in cosines.items():
        assert metrics[f"representation/cosine_layer_{layer}"] == pytest.approx(value, rel=1e-5)
    assert not any(name.startswith(("loss/", "output/")) for name in metrics)


def test_diagnostics_come_every_n_steps_and_change_nothing(make_trainer, tmp_path):
    weights = []
    for every in (0, 2):
        trainer = make_trainer(diagnostics_steps=every, max_steps=4, output_dir=str(tmp_path / str(every)))
        trainer.train()
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
    lines = (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()
    measured = ["output/student_entropy" in json.loads(line) for line in lines]
    assert measured == [False, True, False, True]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_trackers_get_the_same_numbers_as_the_file(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(report_to="tensorboard", logging_steps=1, max_steps=3)
    trainer.recorder.observers.append(lambda step, _: {"eval/avg_at_k": step / 4})
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    board = EventAccumulator(str(events)).Reload()
    names = (
        "loss/total",
        "representation/cosine",
        "rollout/mean_length",
        "grad_norm",
        "time/teacher_seconds",
    )
    for name in names:
        given = {event.step: event.value for event in board.Scalars(f"train/{name}")}
        assert given == {r["step"]: pytest.approx(r[name], rel=1e-5) for r in records}, name
    assert [event.value for event in board.Scalars("eval/avg_at_k")] == [0.25, 0.5, 0.75]
    assert not any(tag.endswith("train/entropy") or "eval/eval" in tag for tag in board.Tags()["scalars"])
    assert not any(tag.startswith("train/eval") for tag in board.Tags()["scalars"])
    assert all("eval/avg_at_k" in record for record in records)


def test_every_step_is_in_the_file_however_rarely_trackers_log(make_trainer, tmp_path):
    make_trainer(logging_steps=3, max_steps=4).train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


class Unclipped(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norms.append(torch.cat(grads).norm().item())


@pytest.mark.parametrize("limit", [1e9, 1e-3, 0.0])
def test_grad_norm_is_that_of_the_step_before_clipping(make_trainer, tmp_path, limit):
    """Without clipping (`max_grad_norm` 0) too."""
    trainer = make_trainer(max_grad_norm=limit, optim="sgd", learning_rate=1e-9)
    watch = Unclipped()
    trainer.add_callback(watch)
    trainer.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line)["grad_norm"] for line in lines]
    if limit == 1e-3:
        assert watch.norms == pytest.approx([1e-3, 1e-3], rel=1e-2) and min(norms) > 0.1
    else:
        assert norms == pytest.approx(watch.norms, rel=1e-5)


def test_evaluation_loss_by_hand(make_trainer):
    held_out = Dataset.from_dict({"prompt": prompt_texts(4)})
    trainer = make_trainer(
        dataset=Dataset.from_dict({"prompt": prompt_texts(8)}),
        per_device_eval_batch_size=4,
        extra={"eval_dataset": held_out},
        script=lambda ids: [10 + sum(ids) % 5, 12, 2][: 1 + len(ids) % 3],
    )
    metrics = trainer.evaluate()
    given = []
    for text in prompt_texts(4):
        prompt = trainer._tokenizer(text)["input_ids"]
        completion = trainer._generate_single_turn([prompt], None, {})[0]
        given.append((prompt, completion, [True] * len(completion)))
    expected = by_hand.representation_loss(trainer.model, trainer.teacher.model, given, [(1, 1), (2, 2)])
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert popped(trainer) == {}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("terms", [{"layers": "1"}, {"output_loss": "full_vocab"}], ids=str)
def test_adapters(make_trainer, roll_out, student, terms, checkpointing):
    """LoRA: the loss is that of the merged model; only adapters that a term reaches are trained."""
    trainer = make_trainer(gradient_checkpointing=checkpointing, extra={"peft_config": LORA}, **terms)
    batch = roll_out(trainer)
    given = by_hand.rollouts(batch)
    merged, teacher = trainer.model.get_base_model(), trainer.teacher.model
    merged.eval()
    with torch.no_grad():
        pairs = [(1, 1)] if "layers" in terms else [(1, 1), (2, 2)]
        expected = by_hand.representation_loss(merged, teacher, given, pairs)
        if "output_loss" in terms:
            expected = expected + by_hand.output_loss(merged, teacher, given, terms)
    merged.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    reached = {n for n in before if "lora_" in n and not ("layers" in terms and ".layers.1." in n)}
    assert moved == reached
    trainer.save_model()
    assert AutoModelForCausalLM.from_pretrained(student).config.num_hidden_layers == 2


class Wrapper(torch.nn.Module):
    """What DDP and FSDP are to a model: its forward runs inside theirs."""

    def __init__(self, model):
        super().__init__()
        self.model, self.inside, self.calls = model, False, 0

    def forward(self, *args, **kwargs):
        self.inside, self.calls = True, self.calls + 1
        result = self.model(*args, **kwargs)
        self.inside = False
        return result


def test_the_loss_is_computed_inside_the_wrappers_forward(make_trainer, roll_out, monkeypatch):
    trainer = make_trainer()
    batch = RolloutBatch.of(roll_out(trainer))
    direct = trainer.update.loss(batch, 0)
    wrapper, seen = Wrapper(trainer.model), []
    monkeypatch.setattr(trainer.accelerator, "unwrap_model", lambda model: model.model)

    def loss(*args):
        seen.append(wrapper.inside)
        return trainer.update.loss(*args)

    assert torch.equal(direct, trainer._through(wrapper, loss, batch))
    assert seen == [True] and wrapper.calls == 1


def test_evaluation_is_not_counted_as_time_of_a_step(make_trainer, tmp_path):
    import time

    trainer = make_trainer(
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        extra={"eval_dataset": Dataset.from_dict({"prompt": prompt_texts(4)})},
        dataset=Dataset.from_dict({"prompt": prompt_texts(8)}),
    )
    generate = trainer._generate_single_turn

    def slow_in_evaluation(*args, **kwargs):
        time.sleep(0 if trainer.model.training else 1.0)
        return generate(*args, **kwargs)

    trainer._generate_single_turn = slow_in_evaluation
    trainer.train()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line)["time/rollout_seconds"] for line in lines) < 1.0


@pytest.mark.parametrize("terms", [{}, {"output_loss": "sampled_token"}], ids=str)
@pytest.mark.parametrize("where", ["target_modules", "modules_to_save"])
def test_adapters_on_the_lm_head_are_refused(make_trainer, terms, where):
    """Without an output loss nothing would train them, and with one the head is read as a plain matrix."""
    modules = {"target_modules": ["q_proj"]} | {
        where: ["q_proj", "lm_head"] if where == "target_modules" else ["lm_head"]
    }
    with pytest.raises(ValueError, match="lm_head"):  # target_modules by TRL, modules_to_save by us
        make_trainer(extra={"peft_config": LoraConfig(r=4, **modules)}, **terms)
