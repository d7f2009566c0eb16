"""Training through a bridge (Eq. 14–15) against a loss by hand, and what a bridge refuses to join."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import by_hand
from oprd.bridge import Bridge, BridgeFitter
from oprd.bridge.identity import identity
from oprd.cli import commands as cli
from oprd.foundation.errors import UserError
from oprd.objective.losses import REPRESENTATION_LOSSES
from oprd.objective.selection import LayerMap
from oprd.training.config import OPRDConfig
from oprd.training.train import parse_training_recipe, train
from random_bridge import LEVEL, PAIRS, RANK, READING, save_random_bridge
from run_folders import lasting, same_weights
from spies import Calls, refuse, refuse_updates
from tiny_pair import QUICK, perturb, prompt_texts
from updates import agree, close, pieces, scripted

SHARED = ((1, 2), (2, 2), (3, 5))  # two student layers look at one teacher layer


@pytest.fixture(scope="session")
def student(make_folder):
    return make_folder(1, num_hidden_layers=3)


@pytest.fixture(scope="session")
def teacher(make_folder):
    return make_folder(2, num_hidden_layers=5, hidden_size=48)


@pytest.fixture(scope="session")
def random_bridge(tmp_path_factory, student, teacher):
    """`random_bridge(**changes)`: `save_random_bridge` for student and teacher, unless changed."""
    models = {"student": student, "teacher": teacher}
    return lambda **changes: save_random_bridge(tmp_path_factory.mktemp("bridge"), **(models | changes))


@pytest.fixture(scope="session")
def bridge(random_bridge):
    return random_bridge()


def expected_loss(trainer, batch, path, pairs=PAIRS, rank=RANK, **kind):
    """By hand from the bridge's file, cut to `rank` where it says rows."""
    tensors = {name: x if name.startswith("mean") else x[:rank] for name, x in load_file(path).items()}
    models = trainer.model, trainer.teacher.model
    return by_hand.bridge_loss(*models, by_hand.rollouts(batch), pairs, tensors, **kind)


# The loss


@pytest.mark.parametrize(
    ("loss", "positions", "reduction"),
    [
        *[(loss, "all", "rollout") for loss in REPRESENTATION_LOSSES],
        *[("normalized_mse", positions, "rollout") for positions in ("last=3", "first=2", "last=2000")],
        *[("normalized_mse", positions, "token") for positions in ("all", "last=3")],
        ("mse", "first=2", "token"),
    ],
)
def test_loss_on_uneven_rollouts(make_trainer, roll_out, gradient, bridge, loss, positions, reduction):
    kind = {"positions": positions, "reduction": reduction}
    trainer = make_trainer(script=scripted, bridge=bridge, representation_loss=loss, **kind)
    batch = roll_out(trainer)
    assert all(len(batch[f"{name}_mask"].sum(-1).unique()) >= 3 for name in ("prompt", "completion"))
    agree(trainer, gradient, batch, expected_loss(trainer, batch, bridge, loss=loss, **kind))


def test_a_loss_of_the_users_own_in_the_bridges_coordinates(make_trainer, roll_out, gradient, bridge):
    widths = set()

    def mean_square(student, teacher):
        widths.add(student.shape[1])
        return (student - teacher).square().mean(-1)

    trainer = make_trainer(script=scripted, bridge=bridge, representation_loss=mean_square)
    batch = roll_out(trainer)
    agree(trainer, gradient, batch, expected_loss(trainer, batch, bridge, loss="mse"))
    assert widths == {RANK}


def test_default_losses(make_trainer, roll_out, gradient, bridge, student):
    trainer = make_trainer(bridge=bridge)
    assert trainer.args.representation_loss == "normalized_mse"
    assert make_trainer(teacher=student).args.representation_loss == "mse"
    batch = roll_out(trainer)
    agree(trainer, gradient, batch, expected_loss(trainer, batch, bridge, loss="normalized_mse"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make_trainer, roll_out, gradient, bridge, reentrant):
    trainer = make_trainer(bridge=bridge, positions="last=3")
    batch = roll_out(trainer)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # as `train` does
    inside = Calls(*(block.mlp for block in trainer.model.model.layers))
    checkpointed = gradient(trainer, batch)
    assert inside.count == 2 * 3 - 1  # run again by the backward, but for the one that it begins with
    trainer.model.gradient_checkpointing_disable()
    agree(trainer, lambda *_: checkpointed, batch, expected_loss(trainer, batch, bridge, positions="last=3"))


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [("all", SHARED), ("last", ((3, 5),)), ("2", ((2, 2),)), ("1,3=5", ((1, 2), (3, 5))), ("2=2", ((2, 2),))],
)
def test_layers_of_the_bridge(make_trainer, roll_out, gradient, random_bridge, layers, pairs):
    """A subset takes the stored teacher layers, which here differ from Eq. 11 (2 would go with 3)."""
    path = random_bridge(pairs=SHARED)
    trainer = make_trainer(bridge=path, layers=layers)
    assert trainer.update.layer_map.pairs == pairs
    batch = roll_out(trainer)
    agree(trainer, gradient, batch, expected_loss(trainer, batch, path, pairs))


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_a_lower_rank_is_a_slice(make_trainer, roll_out, gradient, bridge, rank):
    trainer = make_trainer(bridge=str(Path(bridge).parent), bridge_rank=rank, representation_loss="mse")
    batch = roll_out(trainer)
    agree(trainer, gradient, batch, expected_loss(trainer, batch, bridge, rank=rank, loss="mse"))


def test_before_the_final_norm(make_trainer, roll_out, random_bridge):
    path = random_bridge(pairs=((3, 5),), reading=READING | {"final_norm": False})
    trainer = make_trainer(bridge=path, final_norm=False)
    batch = roll_out(trainer)
    bare = [trainer.model, trainer.teacher.model]
    value = trainer.compute_loss(trainer.model, batch).item()
    for model in bare:
        model.model.norm = torch.nn.Identity()
    assert value == pytest.approx(expected_loss(trainer, batch, path, ((3, 5),)).item(), rel=1e-5)


def test_equal_widths_do_not_disable_the_bridge(make_trainer, make_folder, roll_out, gradient, random_bridge):
    twin = make_folder(2, num_hidden_layers=3)
    pairs = ((1, 1), (2, 2), (3, 3))
    path = random_bridge(pairs=pairs, teacher=twin)
    trainer = make_trainer(teacher=twin, bridge=path)
    batch = roll_out(trainer)
    expected = expected_loss(trainer, batch, path, pairs)
    models = trainer.model, trainer.teacher.model
    direct = by_hand.representation_loss(*models, by_hand.rollouts(batch), pairs, "normalized_mse")
    assert abs(direct.item() - expected.item()) > 0.1 * expected.item()
    agree(trainer, gradient, batch, expected)


@pytest.mark.parametrize("loss", ["normalized_mse", "relative_mse"])
def test_a_full_bridge_between_equal_models(make_trainer, roll_out, gradient, student, tmp_path, loss):
    """Fitted on states of the student and of itself, it maps every row onto itself."""
    model, ids = AutoModelForCausalLM.from_pretrained(student), torch.arange(200).view(4, 50)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    rows = {layer: hidden[layer].flatten(0, 1) for layer in (1, 2, 3)}
    fitter = BridgeFitter(LayerMap(((1, 1), (2, 2), (3, 3))))
    fitter.update(rows, rows)
    path = fitter.fit(32).save(tmp_path / "bridge")
    trainer = make_trainer(teacher=student, bridge=str(path), representation_loss=loss)
    value, given = gradient(trainer, roll_out(trainer))
    assert 0 <= value <= 1e-10
    assert given.abs().max() <= 1e-4
    trainer.update.averages.pop(lambda values: values)


def test_composite_on_one_forward_of_either_model(make_trainer, roll_out, gradient, bridge):
    kind = {"output_loss": "full_vocab"}
    trainer = make_trainer(
        bridge=bridge, representation_weight="3", output_weight="0.5", positions="last=3", **kind
    )
    batch = roll_out(trainer)
    calls = [Calls(model) for model in (trainer.model.model, trainer.teacher.model.model)]
    trainer.compute_loss(trainer.model, batch)
    assert [call.count for call in calls] == [1, 1]
    given = by_hand.rollouts(batch)
    output = by_hand.output_loss(trainer.model, trainer.teacher.model, given, kind)
    agree(
        trainer, gradient, batch, 3 * expected_loss(trainer, batch, bridge, positions="last=3") + 0.5 * output
    )


def test_bf16_states_are_projected_in_float32(make_trainer, roll_out, gradient, bridge):
    trainer = make_trainer(bridge=bridge, bf16=True, layers="2", representation_loss="mse")
    batch = roll_out(trainer)
    states = {}
    for name, block in (
        ("student", trainer.model.model.layers[1]),
        ("teacher", trainer.teacher.model.model.layers[2]),
    ):
        block.register_forward_hook(lambda m, a, out, name=name: states.update({name: out.detach().double()}))
    value = trainer.compute_loss(trainer.model, batch)
    assert value.dtype == torch.float32
    tensors = {name: x.double() for name, x in load_file(bridge).items() if name.endswith(".2")}
    s = states["student"] @ tensors["student.2"].T + tensors["offset.2"]
    t = (states["teacher"] - tensors["mean.2"]) @ tensors["teacher.2"].T
    first = batch["prompt_ids"].shape[1] - 1
    per_rollout = [
        [by_hand.representation_row("mse", s[i, first + row], t[i, first + row]) for row in range(length)]
        for i, length in enumerate(batch["completion_mask"].sum(-1).tolist())
    ]
    assert value.item() == pytest.approx(by_hand.reduce(per_rollout, "rollout").item(), rel=2e-6)


def test_adapters(make_trainer, roll_out, gradient, bridge, student, tokenizer):
    """LoRA changes neither whose bridge it is nor the loss of the merged model."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    trainer = make_trainer(bridge=bridge, extra={"peft_config": lora})
    plain = identity(AutoModelForCausalLM.from_pretrained(student), tokenizer)
    assert identity(trainer.model, tokenizer) == plain
    batch = roll_out(trainer)
    merged = trainer.model.get_base_model()
    tensors, given = load_file(bridge), by_hand.rollouts(batch)
    merged.eval()
    expected = by_hand.bridge_loss(merged, trainer.teacher.model, given, PAIRS, tensors)
    merged.train()
    agree(trainer, gradient, batch, expected)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_teacher(make_trainer, roll_out, gradient, bridge, tmp_path, place):
    """Weights that accelerate keeps on the disk are as good as others."""
    plain = make_trainer(bridge=bridge)
    batch = roll_out(plain)
    devices = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": place}
    devices |= {f"model.layers.{i}": place if i % 2 else "cpu" for i in range(5)}
    kwargs = {"device_map": devices, "offload_folder": str(tmp_path / "offload")}
    placed = make_trainer(bridge=bridge, teacher_model_init_kwargs=kwargs)
    assert gradient(placed, batch)[0] == pytest.approx(gradient(plain, batch)[0], rel=1e-6)


def test_evaluation(make_trainer, bridge):
    data = Dataset.from_dict({"prompt": prompt_texts(8)})
    trainer = make_trainer(
        bridge=bridge,
        dataset=data,
        per_device_eval_batch_size=4,
        extra={"eval_dataset": data.select(range(4))},
        script=scripted,
    )
    metrics = trainer.evaluate()
    prompts = [trainer._tokenizer(text)["input_ids"] for text in prompt_texts(4)]
    given = [(prompt, scripted(prompt), [True] * len(scripted(prompt))) for prompt in prompts]
    models = trainer.model, trainer.teacher.model
    expected = by_hand.bridge_loss(*models, given, PAIRS, load_file(bridge))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_states_that_are_not_finite(make_trainer, random_bridge):
    """Layers are the student's, although the teacher's layer 2 is what broke."""
    trainer = make_trainer(bridge=random_bridge(pairs=SHARED[:2]))
    trainer.teacher.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"step 1: .*not finite at layers \[1, 2\], in rollouts of .*What"):
        trainer.train()


# What must not change it, and what it must not run


@pytest.mark.parametrize("splits", [[[0], [1], [2], [3], [4], [5]], [[5, 3, 1, 4, 2, 0]]], ids=str)
def test_micro_batches_and_order(make_trainer, roll_out, gradient, random_bridge, splits):
    trainer = make_trainer(
        script=scripted, bridge=random_bridge(pairs=SHARED), mask_truncated_completions=True
    )
    batch = roll_out(trainer)
    assert 0 in batch["representation_weights"].count_nonzero(-1)
    close(gradient(trainer, batch), gradient(trainer, *pieces(batch, splits)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_head_runs(make_trainer, bridge, checkpointing):
    trainer = make_trainer(bridge=bridge, gradient_checkpointing=checkpointing)
    trainer.teacher.model.lm_head.register_forward_pre_hook(refuse)
    refuse_updates(trainer, trainer.model.lm_head)
    assert not trainer.model.lm_head.weight.requires_grad
    trainer.train()
    assert trainer.state.global_step == 2


def test_only_projected_rows_are_kept(make_trainer, roll_out, random_bridge):
    """r numbers per row and pair leave either model, also where two pairs share a teacher layer."""
    trainer = make_trainer(bridge=random_bridge(pairs=SHARED), bridge_rank=3, positions="last=2")
    batch = roll_out(trainer)
    read, kept = trainer.teacher.read, []

    def watch(*args):
        kept.append(read(*args))
        return kept[-1]

    trainer.teacher.read = watch
    trainer.compute_loss(trainer.model, batch)
    ((states,),) = kept
    rows = batch["completion_mask"].sum(-1).clamp(max=2).sum().item()
    assert {layer: tuple(x.shape) for layer, x in states.items()} == {2: (rows, 6), 5: (rows, 3)}
    assert all(x.dtype == torch.float32 for x in states.values())


# Runs


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_bridge_phase_then_an_output_phase(make_trainer, bridge, tmp_path):
    trainer = make_trainer(
        bridge=bridge,
        representation_weight="0=1,2=1,3=0",
        output_weight="0=0,2=0,3=1",
        output_loss="sampled_token",
        max_steps=5,
    )
    early = lambda: trainer.state.global_step < 3  # noqa: E731
    refuse_updates(trainer, trainer.model.lm_head, early)
    trainer.teacher.model.lm_head.register_forward_pre_hook(lambda *_: refuse() if early() else None)
    trainer.train()
    log = records(tmp_path / "run")
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5]
    cosines = [record["representation/cosine"] for record in log[:3]]
    for step, record in enumerate(log):
        assert record["loss/total"] == record["loss/representation" if step < 3 else "loss/output"]
        assert ("loss/representation_layer_2" in record) is (step < 3)
        assert ("output/student_entropy" in record) is (step >= 3)
        assert record.get("bridge/held_out_alignment", LEVEL) == pytest.approx(LEVEL)
        assert ("bridge/held_out_alignment" in record) is (step < 3)
        if step < 3:
            mean = sum(cosines[: step + 1]) / (step + 1)
            assert record["bridge/alignment"] == pytest.approx(mean)
            assert record["loss/representation"] == pytest.approx(2 - 2 * cosines[step], rel=1e-5)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, student, teacher, bridge):
    """`recipe(output_dir, **changes)`: a recipe's file; a change to None leaves the key out."""
    home = tmp_path_factory.mktemp("recipe")
    prompts = home / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompt_texts(12)))
    names = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "dataset_name": str(prompts),
        "bridge": bridge,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
    }

    def write(output_dir, **changes):
        file = home / "recipe.yaml"
        settings = QUICK | names | {"output_dir": str(output_dir)} | changes
        file.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return str(file)

    return write


@pytest.fixture(scope="module")
def whole_and_resumed(recipe, tmp_path_factory):
    """The folders of one run of four steps, and of one that was stopped after two."""
    whole, parts = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "parts"))
    train(*parse_training_recipe(recipe(whole)))
    train(*parse_training_recipe(recipe(parts, max_steps=2)))
    assert len(lasting(parts)) == 2
    train(*parse_training_recipe(recipe(parts)))
    return whole, parts


def test_a_resumed_run_equals_an_uninterrupted_one(whole_and_resumed):
    whole, parts = whole_and_resumed
    assert same_weights(parts, whole)
    mean = "bridge/alignment"
    for resumed, straight in zip(lasting(parts), lasting(whole), strict=True):
        assert resumed | {mean: straight[mean]} == straight


def test_the_running_alignment_goes_on_when_resumed(whole_and_resumed):
    whole, parts = map(lasting, whole_and_resumed)
    assert [r["bridge/alignment"] for r in parts] == [r["bridge/alignment"] for r in whole]


# Refused, in one sentence and with nothing written


@pytest.fixture
def refused(recipe, tmp_path, capsys):
    """`refused(**changes)`: the last line of `oprd train`, which exits with 2 and leaves no folder."""

    def run(**changes):
        assert cli.run(["train", recipe(tmp_path / "run", **changes)]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and not (tmp_path / "run").exists()
        return error.strip().splitlines()[-1]

    return run


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": "2=4"}, "pairs student layer 2 with teacher layer 4, but the bridge was fitted with 2=3"),
        ({"layers": "4"}, "the student has layers 1 to 3"),
        ({"bridge_rank": 5}, "rank 5 is too high: the bridge stores 4 directions for student layer 1"),
        ({"bridge_rank": 0}, "bridge_rank must be 1 or more, got 0"),
        ({"bridge": None, "bridge_rank": 2}, "bridge_rank is set, but there is no bridge"),
        ({"bridge": "./nowhere"}, "there is no bridge at ./nowhere"),
        ({"bridge": None}, "the student is 32 wide and the teacher 48"),
        ({"final_norm": False}, "fitted with final_norm: True, the recipe has False"),
        ({"teacher_chat_template": "own"}, "fitted with teacher_chat_template: student, the recipe has own"),
        ({"teacher_tokenization": "student"}, "fitted with teacher_tokenization: own"),
    ],
    ids=str,
)
def test_settings_that_the_bridge_denies(refused, changes, says):
    assert says in refused(**changes)


def test_a_layer_without_a_projector(refused, random_bridge):
    path = random_bridge(pairs=((1, 1), (3, 5)))
    assert "no projector for student layer 2; it has 1, 3" in refused(bridge=path, layers="2")


@pytest.mark.parametrize(
    ("role", "config"),
    [
        ("student", {"shift": 4, "num_hidden_layers": 3}),
        ("teacher", {"shift": 4, "num_hidden_layers": 5, "hidden_size": 48}),
        ("student", {"shift": 1, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}),
        ("teacher", {"shift": 2, "num_hidden_layers": 5, "hidden_size": 48, "num_key_value_heads": 2}),
    ],
    ids=["student's weights", "teacher's weights", "student's config", "teacher's config"],
)
def test_other_models_of_the_same_sizes(refused, make_folder, student, teacher, role, config):
    name = "model_name_or_path" if role == "student" else "teacher_model_name_or_path"
    other = make_folder(**config)
    line = refused(**{name: other})
    assert f"fitted for the {role} {student if role == 'student' else teacher} and this is {other}" in line
    assert "(weights: " in line and line.endswith("fit a bridge for this pair with oprd bridge")


@pytest.mark.parametrize(
    ("role", "config", "says"),
    [
        (
            "student",
            {"num_hidden_layers": 2},
            "layer 3, 32 wide, of a student, but this student has 2 layers",
        ),
        ("student", {"num_hidden_layers": 4}, "(num_layers: 3, here 4)"),
        (
            "student",
            {"num_hidden_layers": 3, "hidden_size": 48},
            "layer 1, 32 wide, of a student, but this student has 3 layers 48 wide",
        ),
        (
            "teacher",
            {"num_hidden_layers": 5},
            "layer 1, 48 wide, of a teacher, but this teacher has 5 layers 32 wide",
        ),
        (
            "teacher",
            {"num_hidden_layers": 4, "hidden_size": 48},
            "layer 5, 48 wide, of a teacher, but this teacher has 4 layers 48 wide",
        ),
    ],
)
def test_models_of_other_sizes(refused, make_folder, role, config, says):
    name = "model_name_or_path" if role == "student" else "teacher_model_name_or_path"
    assert says in refused(**{name: make_folder(1 if role == "student" else 2, **config)})


def test_swapped_roles(refused, make_folder, random_bridge, student, teacher):
    names = {"model_name_or_path": teacher, "teacher_model_name_or_path": student}
    assert "32 wide, of a student, but this student has 5 layers 48 wide" in refused(**names)
    twin = make_folder(2, num_hidden_layers=3)
    path = random_bridge(pairs=((1, 1), (2, 2)), teacher=twin)
    line = refused(model_name_or_path=twin, teacher_model_name_or_path=student, bridge=path)
    assert "fitted for the student" in line and "weights" in line


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_another_tokenizer(refused, student, teacher, tmp_path, role):
    names = {"student": ("model_name_or_path", student), "teacher": ("teacher_model_name_or_path", teacher)}
    key, folder = names[role]
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]
    vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
    file.write_text(json.dumps(stored), encoding="utf-8")
    line = refused(**{key: str(copy)})
    assert f"fitted for the {role} {folder}" in line and "(tokenizer: " in line


@pytest.mark.parametrize("damage", ["truncated", "nan", "foreign"])
def test_a_broken_bridge(refused, bridge, tmp_path, damage):
    path, tensors = tmp_path / "broken.safetensors", load_file(bridge)
    if damage == "truncated":
        path.write_bytes(Path(bridge).read_bytes()[:-100])
    elif damage == "nan":
        stored = Bridge.load(bridge)
        stored.projectors[2].student[1, 1] = float("nan")
        stored.save(path)
    else:
        save_file(tensors, path)
    says = {"truncated": "is damaged", "nan": "not finite at student layer 2", "foreign": "not a bridge"}
    assert says[damage] in refused(bridge=str(path))


def test_a_bridge_of_another_run_in_the_folder(recipe, random_bridge, tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.run(["train", recipe(run, max_steps=1)]) == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for changes in ({"bridge": random_bridge(pairs=SHARED)}, {"bridge_rank": 2}):
        assert cli.run(["train", recipe(run, max_steps=1, **changes)]) == 2
        assert f"holds a run with {next(iter(changes))}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


# The anchor


def states_of(model, batch):
    """All layers' states of every rollout, detached."""
    with torch.no_grad():
        given = by_hand.rollouts(batch)
        return [by_hand.states_and_logits(model, prompt, completion)[0] for prompt, completion, _ in given]


def expected_anchor(model, before, batch, path, positions):
    """By hand: ‖d‖² / ‖h_ref‖², where d lacks what the bridge sees of the rows it compares."""
    tensors, per_layer = load_file(path), []
    for layer, _ in PAIRS:
        rows = tensors[f"student.{layer}"].double()
        seen = torch.linalg.pinv(rows) @ rows
        values = []
        for then, (prompt, completion, supervised) in zip(before, by_hand.rollouts(batch), strict=True):
            moved = by_hand.states_and_logits(model, prompt, completion)[0][layer] - then[layer]
            compared = by_hand.chosen(supervised, positions)
            left = [d - d @ seen if row in compared else d for row, d in enumerate(moved)]
            norms = then[layer].square().sum(-1)
            values.append([d.square().sum() / norm for d, norm in zip(left, norms, strict=False)])
        per_layer.append(by_hand.reduce(values, "rollout"))
    return torch.stack(per_layer).mean()


@pytest.mark.parametrize("positions", ["all", "last=3"])
def test_anchor_holds_what_the_bridge_leaves_open(make_trainer, roll_out, gradient, bridge, positions):
    trainer = make_trainer(script=scripted, bridge=bridge, positions=positions, anchor_weight="0.5")
    batch = roll_out(trainer)
    before = states_of(trainer.model, batch)
    perturb(trainer.model, seed=4)
    total = expected_loss(trainer, batch, bridge, positions=positions)
    agree(
        trainer,
        gradient,
        batch,
        total + 0.5 * expected_anchor(trainer.model, before, batch, bridge, positions),
    )


def test_anchor_of_an_unmoved_student_is_exactly_zero(make_trainer, roll_out, gradient, bridge):
    trainer = make_trainer(script=scripted, bridge=bridge, representation_weight="0=0,1=1", anchor_weight="1")
    value, given = gradient(trainer, roll_out(trainer))
    assert value == 0 and given.abs().max() == 0


def test_anchor_of_adapters_is_the_model_below_them(make_trainer, roll_out, gradient, bridge):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    keys = {"representation_weight": "0=0,1=1", "anchor_weight": "1", "positions": "last=3"}
    trainer = make_trainer(bridge=bridge, extra={"peft_config": lora}, **keys)
    batch = roll_out(trainer)
    value, _ = gradient(trainer, batch)
    assert trainer.update.anchor.reference.model is trainer.model
    model = trainer.model.get_base_model().eval()
    trainer.model.base_model.disable_adapter_layers()
    before = states_of(model, batch)
    trainer.model.base_model.enable_adapter_layers()
    expected = expected_anchor(model, before, batch, bridge, "last=3")
    assert value == pytest.approx(expected.item(), rel=1e-5) and value > 0


def test_anchor_needs_a_bridge():
    with pytest.raises(UserError, match="anchor_weight needs a bridge"):
        OPRDConfig(anchor_weight="1")


def test_the_anchors_copy_goes_where_the_student_will_be(make_trainer, bridge):
    """Under DeepSpeed the student is still on the host when it is copied."""
    anchor = make_trainer(bridge=bridge, anchor_weight="1").update.anchor
    anchor.place(torch.device("meta"), None)
    assert anchor.reference.model.device.type == "meta"


def test_a_bridge_of_a_student_whose_config_names_no_padding(make_trainer, make_folder, tmp_path, teacher):
    student = shutil.copytree(make_folder(1), tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    bridge = save_random_bridge(tmp_path, str(student), teacher, pairs=((1, 1), (2, 2)))
    assert make_trainer(student=str(student), bridge=bridge).update.comparison.bridge is not None
