"""Recipes: one YAML mapping, the same keys as flags, and what is said when either is wrong."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from oprd.foundation.errors import UserError
from oprd.foundation.recipe import read_recipe
from oprd.training.train import parse_training_recipe

BASE = {
    "model_name_or_path": "tiny:student",
    "teacher_model_name_or_path": "tiny:teacher",
    "dataset_name": "tiny",
    "bf16": "false",
    "use_cpu": "true",
    "report_to": "none",
}


@pytest.fixture
def parse(tmp_path):
    """`parse(yaml_lines, flags)`: the run and the config of BASE plus some lines."""

    def parse(lines="", flags=(), base=BASE):
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{key}: {value}\n" for key, value in base.items()) + lines)
        return parse_training_recipe(path, ["--output_dir", str(tmp_path / "run"), *flags])

    return parse


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("representation_weight: 0=1.0,400=0", "representation_weight", "0=1.0,400=0"),
        ("representation_weight: 2", "representation_weight", "2"),
        ("representation_weight: 0.5", "representation_weight", "0.5"),
        ("layers: 14=18,28=36", "layers", "14=18,28=36"),
        ("layers: 2", "layers", "2"),
        ("layers: [1, 2]", "layers", "1,2"),
        ("layers: 1,2,4", "layers", "1,2,4"),
        ("positions: last=3", "positions", "last=3"),
        ("renormalize: false", "renormalize", False),
        ("renormalize: true", "renormalize", True),
        ("mask_truncated_completions: yes", "mask_truncated_completions", True),
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: 0.001", "learning_rate", 1e-3),
        ("warmup_steps: 0.03", "warmup_steps", 0.03),
        ("max_steps: 7", "max_steps", 7),
        ("max_prompt_length: 12", "max_prompt_length", 12),
        ("chat_template_kwargs: {thinking: false}", "chat_template_kwargs", {"thinking": False}),
        ("teacher_chat_template_kwargs: {t: [1, x]}", "teacher_chat_template_kwargs", {"t": [1, "x"]}),
        ("teacher_model_init_kwargs: {dtype: bfloat16}", "teacher_model_init_kwargs", {"dtype": "bfloat16"}),
        ("model_init_kwargs: {revision: 2026-11-29}", "model_init_kwargs", {"revision": "2026-11-29"}),
        ("generation_kwargs: {do_sample: false}", "generation_kwargs", {"do_sample": False}),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("save_strategy: no", "save_strategy", SaveStrategy.NO),
        ("eval_strategy: no", "eval_strategy", IntervalStrategy.NO),
        ("eval_strategy: \"no\"", "eval_strategy", IntervalStrategy.NO),
        ("run_name: off", "run_name", "off"),
        ("run_name: 2026-13-45", "run_name", "2026-13-45"),
        ("run_name: 2026-11-29", "run_name", "2026-11-29"),
        ("run_name: 12:30:45", "run_name", "12:30:45"),
        ("run_name: 007", "run_name", "007"),
        ("run_name: 1_000", "run_name", "1_000"),
        ("run_name: 0x1F", "run_name", "0x1F"),
        ("run_name: true", "run_name", "true"),
        ("run_name: null", "run_name", None),
        ("run_name: 'null'", "run_name", "null"),
        ("max_completion_length: null", "max_completion_length", None),
        ("max_completion_length: ~", "max_completion_length", None),
        ("max_steps: 010", "max_steps", 10),
        ("seed: 08", "seed", 8),
        ("learning_rate: 1E-5", "learning_rate", 1e-5),
        ("learning_rate: 1.e-5", "learning_rate", 1e-5),
        ("renormalize: off", "renormalize", False),
        ("renormalize: No", "renormalize", False),
        ("renormalize: 'on'", "renormalize", True),
        ("bf16: no", "bf16", False),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}", "lr_scheduler_kwargs",
         {"min_lr": 1e-6}),
        ("chat_template_kwargs: {enable_thinking: no, s: 'no'}", "chat_template_kwargs",
         {"enable_thinking": False, "s": "no"}),
        ("chat_template_kwargs: {a: 010, b: 1:30, c: 2026-13-45, d: null, e: -2, f: .5, g: 1.2.3}",
         "chat_template_kwargs",
         {"a": 10, "b": "1:30", "c": "2026-13-45", "d": None, "e": -2, "f": 0.5, "g": "1.2.3"}),
        ("run_name: \"it's a name: -- odd\"", "run_name", "it's a name: -- odd"),
        ("run_name: -dash", "run_name", "-dash"),
        ("gradient_checkpointing: off", "gradient_checkpointing", False),
    ],
)  # fmt: skip
def test_values(parse, line, key, value):
    base = {k: v for k, v in BASE.items() if not line.startswith(f"{k}:")}
    _, config = parse(line + "\n", base=base)
    assert getattr(config, key) == value
    assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--layers", "last"], "layers", "last"),
        (["--layers=1"], "layers", "1"),
        (["--max_steps", "3"], "max_steps", 3),
        (["--representation_weight", "0=1,5=0"], "representation_weight", "0=1,5=0"),
        (["--renormalize", "false"], "renormalize", False),
        (["--learning_rate", "3e-4"], "learning_rate", 3e-4),
        (["--chat_template_kwargs", '{"a": 1}'], "chat_template_kwargs", {"a": 1}),
        (["--chat_template_kwargs", '{"a": 1e-5}'], "chat_template_kwargs", {"a": 1e-5}),
        (["--chat_template_kwargs", "{a: {b: no}}"], "chat_template_kwargs", {"a": {"b": False}}),
        (["--model_init_kwargs={dtype: bfloat16}"], "model_init_kwargs", {"dtype": "bfloat16"}),
        (["--run_name", "{{ name }}"], "run_name", "{{ name }}"),
        (["--renormalize", "off"], "renormalize", False),
        (["--save_strategy", "no"], "save_strategy", SaveStrategy.NO),
        (["--report_to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--model_init_kwargs", "{revision: 2026-11-29}"], "model_init_kwargs", {"revision": "2026-11-29"}),
    ],
)
def test_flags_override_the_recipe(parse, flags, key, value):
    _, config = parse("layers: all\nmax_steps: 9\nlearning_rate: 0.1\nrenormalize: true\n", flags)
    assert getattr(config, key) == value


@pytest.mark.parametrize("flags", [["--bridge", "null"], ["--bridge=null"]])
def test_null_unsets_what_the_recipe_sets(parse, flags):
    _, config = parse("bridge: runs/bridge\nlayers: last\n", [*flags, "--max_steps", "3"])
    assert (config.bridge, config.layers, config.max_steps) == (None, "last", 3)


def test_names(parse):
    run, config = parse()
    assert run.model_name_or_path == "tiny:student" and run.dataset_name == "tiny"
    assert config.teacher_model_name_or_path == "tiny:teacher"
    assert isinstance(config, TrainingArguments)
    run, _ = parse(flags=["--model_name_or_path", "other"])
    assert run.model_name_or_path == "other"


@pytest.mark.parametrize(
    ("lines", "flags", "message"),
    [
        ("layer: all\n", [], r"recipe\.yaml: unknown key 'layer'; did you mean layers\?"),
        ("representation_wieght: 1\n", [], "did you mean representation_weight"),
        ("zzzzzz: 1\n", [], "unknown key 'zzzzzz'"),
        ("", ["--layer", "all"], r"unknown flag '--layer'; did you mean layers\?"),
        ("", ["--lay", "all"], "unknown flag '--lay'"),
        ("", ["stray"], "unknown flag 'stray'"),
        ("", ["--max_steps"], "max_steps"),
        ("", ["--max_steps", "many"], "max_steps.*many"),
        ("max_steps: many\n", [], "max_steps.*many"),
        ("learning_rate: fast\n", [], "learning_rate.*fast"),
        ("renormalize: perhaps\n", [], "renormalize|perhaps"),
        ("max_steps: [1, 2]\n", [], "max_steps takes one value, and this is a list"),
        ("max_steps: null\n", [], "max_steps has no value"),
        ("max_steps: 1e3\n", [], "max_steps.*1e3"),
        ("renormalize: 2026-11-29\n", [], "2026-11-29"),
        ("lr_scheduler_type: off\n", [], "off is not a valid SchedulerType, please select"),
        ("lora_target_modules: []\n", [], "lora_target_modules has no value"),
        ("run_name: &a [*a]\n", [], "."),
        ("layers:\n", [], r"layers has no value; give it one or leave the key out"),
        ("layers: null\n", [], "layers has no value"),
        ("positions: last=0\n", [], "last=0"),
        ("num_generations: 0\n", [], "num_generations must be 1 or more"),
        ("beta: 0.5\n", [], "beta is TRL's name"),
        ("layers: all\nlayers: last\n", [], "layers"),
        ("lr_scheduler_type: squiggle\n", [], "squiggle"),
        ("teacher_chat_template_kwargs: '{broken'\n", [], "."),
        ("", ["--chat_template_kwargs", "{broken"], "."),
        ("1: 2\n", [], "mapping of keys"),
    ],
    ids=str,
)
def test_refused(parse, lines, flags, message):
    with pytest.raises(UserError, match=message):
        parse(lines, flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"bad\.yaml, line 3: malformed YAML"),
        ("a: 1\n\tb: 2\n", r"bad\.yaml, line 2: malformed YAML"),
        ("a: b: c\n", r"line 1: malformed YAML"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values"),
        ("just text", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("!!python/object:os.system {}\n", "malformed YAML"),
        ("a: !!python/name:os.system\n", "line 1: malformed YAML"),
        ("a: !b 1\n", "line 1: malformed YAML"),
        ("a: {b: 1, b: 2}\n", "the key 'b' stands twice"),
        ("a: " + "[" * 20000 + "\n", "malformed YAML: it is nested too deeply"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(path)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_every_value_is_the_text_that_was_written(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(yaml.safe_dump({"run_name": text}, allow_unicode=True), encoding="utf-8")
    assert read_recipe(path) == {"run_name": text}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"there is no recipe file .*nothing\.yaml"):
        read_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="cannot read the recipe"):
        read_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError):
        read_recipe(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name", "teacher_model_name_or_path"])
def test_names_are_required(parse, key):
    with pytest.raises(UserError, match=f"names no {key}: add it"):
        parse(base={k: v for k, v in BASE.items() if k != key})


@pytest.mark.parametrize(
    "key",
    [
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "accuracy_steps",
        "accuracy_problems",
        "accuracy_samples",
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_below_one_are_refused(parse, key, value):
    with pytest.raises(UserError, match=f"{key} must be 1 or more, got {value}"):
        parse(f"{key}: {value}\n")


@pytest.mark.parametrize(
    ("lines", "flags", "given"),
    [
        ("fsdp: true\n", [], True),
        ("", ["--fsdp"], True),
        ("fsdp: false\n", [], False),
        ("", ["--fsdp", "true"], True),
        ("fsdp: true\n", ["--fsdp", "false"], False),
        ("", [], False),
    ],
)
def test_fsdp_is_asked_for_with_or_without_a_value(parse, lines, flags, given):
    _, config = parse(lines, flags)
    assert bool(config.fsdp) == given


@pytest.mark.parametrize(
    ("asked", "adapted"),
    [
        ({}, "all-linear"),
        ({"lora_target_modules": "all-linear"}, "all-linear"),
        ({"lora_target_modules": "q_proj"}, {"q_proj"}),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
    ],
    ids=["by default", "all, by peft's word", "one by name", "a list of names"],
)
def test_modules_that_are_adapted(tmp_path, asked, adapted):
    path = tmp_path / "recipe.yaml"
    names = {"model_name_or_path": "tiny:student", "teacher_model_name_or_path": "tiny:teacher"}
    keys = names | {"dataset_name": "tiny", "output_dir": str(tmp_path / "run"), "use_peft": True}
    path.write_text(yaml.safe_dump(keys | asked))
    run, _ = parse_training_recipe(path)
    assert run.lora.target_modules == adapted


@pytest.mark.parametrize(
    ("content", "flags"),
    [
        ("layers: " + "[" * 5000, []),
        ("model_init_kwargs: " + "{a: " * 5000 + "1" + "}" * 5000, []),
        ("", ["--model_init_kwargs", '{"a": ' * 5000 + "1" + "}" * 5000]),
    ],
    ids=["a list", "a mapping", "a flag"],
)
def test_what_is_nested_too_deeply_is_refused(parse, content, flags):
    with pytest.raises(UserError, match="nested too deeply"):
        parse(content, flags)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "missing"])
def test_recipes_of_names_that_no_file_has(tmp_path, name):
    with pytest.raises(UserError, match="recipe"):
        parse_training_recipe(tmp_path / name)
