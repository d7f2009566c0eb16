"""The command line as users meet it: exit codes, one clear last line, nothing half-written."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from tqdm import tqdm

from oprd.bridge.recipe import BridgeArguments
from oprd.cli import commands as cli
from oprd.foundation.errors import Fault, UserError
from oprd.objective.settings import ObjectiveSettings
from oprd.rollouts.engines.vllm import is_installed
from oprd.rollouts.generation import HFEngine
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments

RECIPE = {
    "model_name_or_path": "tiny:student",
    "teacher_model_name_or_path": "tiny:teacher",
    "dataset_name": "tiny",
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 8,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_steps": 1,
}
EVALUATION = ["eval", "--model", "tiny:student", "--data", "tiny", "--output", "x"]
WITHOUT_VLLM = pytest.mark.skipif(is_installed(), reason="vLLM is installed")


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        settings = RECIPE | {"output_dir": str(tmp_path / "run")} | changes
        path.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not ...}))
        return str(path)

    return write


def refused(capsys, argv):
    """The last line of a command that exits with 2 and shows no traceback."""
    assert cli.run(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layrs": "all"}, "did you mean layers"),
        ({"layers": 0}, "layer 0"),
        ({"layers": "1,9"}, "layer 9"),
        ({"layers": "2,2"}, "twice"),
        ({"positions": "last=0"}, "last=0"),
        ({"representation_weight": "0=1,5=2,3=1"}, "increase strictly"),
        ({"representation_weight": "-1"}, "0 or more"),
        ({"representation_weight": 0}, "all weights are zero"),
        ({"representation_weight": 0, "output_loss": "top_k", "output_top_k": 1}, "identically zero"),
        ({"output_loss": "top_k", "output_top_k": 100000}, "vocabulary"),
        ({"output_loss": "nonsense"}, "nonsense"),
        ({"divergence": "jsd"}, "full_vocab"),
        ({"divergence": "nonsense", "output_loss": "full_vocab"}, "nonsense"),
        ({"num_generations": 0}, "num_generations"),
        ({"num_generations": 3}, "num_generations"),
        ({"beta": 0.5}, "divergence"),
        ({"model_name_or_path": "./nowhere"}, "./nowhere"),
        ({"model_name_or_path": ...}, "model_name_or_path"),
        ({"model_name_or_path": "tiny:nobody"}, "tiny:student"),
        ({"teacher_model_name_or_path": "./nowhere"}, "./nowhere"),
        ({"teacher_model_name_or_path": ...}, "teacher_model_name_or_path"),
        ({"dataset_name": "./nothing.jsonl"}, "nothing.jsonl"),
        ({"max_steps": "many"}, "max_steps"),
        ({"max_prompt_length": 3}, "3"),
        ({"student_temperature": 0}, "student_temperature"),
        ({"layers": None}, "layers"),
        ({"max_completion_length": 0}, "max_completion_length must be 1 or more, got 0"),
        ({"max_completion_length": -3}, "max_completion_length must be 1 or more, got -3"),
        ({"ignore_data_skip": True}, "a resumed run would draw the first prompts again: leave it out"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "resumes from the last complete checkpoint"),
        ({"eval_on_start": True}, "eval_on_start needs an eval_dataset"),
        ({"optim_args": "a"}, "optim_args: a: not enough values"),
    ],
    ids=str,
)
def test_mistakes_in_a_recipe(capsys, recipe, tmp_path, changes, says):
    assert says in refused(capsys, ["train", recipe(**changes)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_peft": True, "lora_target_modules": ["qproj"]}, "qproj"),
        ({"use_peft": True, "lora_r": 0}, "lora_r must be 1 or more, got 0"),
        ({"model_init_kwargs": {"attn_implementation": "nonsense"}}, "nonsense"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"layers": "1,9"}, "layer 9"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("command", "flags"), [("train", []), ("train", ["--dry_run", "true"]), ("doctor", [])], ids=str
)
def test_what_a_run_refuses_is_refused_before_it_too(capsys, recipe, tmp_path, command, flags, changes, says):
    assert says in refused(capsys, [command, recipe(**changes), *flags])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty.jsonl"),
        ('{"question": "?"}\n', "prompt"),
        ('{"prompt": "a"}\n{"prompt": 3}\n', "row 1"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2"),
    ],
    ids=["empty", "no prompt column", "wrong type", "malformed"],
)
def test_mistakes_in_a_dataset(capsys, recipe, tmp_path, content, says):
    data = tmp_path / "empty.jsonl"
    data.write_text(content)
    assert says in refused(capsys, ["train", recipe(dataset_name=str(data))])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["distil"], "choose from 'demo', 'train', 'doctor', 'bridge', 'eval', 'tiny'"),
        (["help", "distil"], "invalid choice: 'distil'"),
        (["recipe.yaml"], "recipe.yaml is a recipe: oprd train recipe.yaml, or bridge or doctor in place"),
        (["train"], "oprd train needs a recipe, a YAML file, or its keys as flags"),
        (["bridge"], "oprd bridge needs a recipe"),
        (["doctor", "--json"], "oprd doctor needs a recipe"),
        (["train", "nowhere.yaml"], "there is no recipe file nowhere.yaml"),
        (["train", "Qwen/Qwen2.5-1.5B"], "a student is named by --model_name_or_path Qwen/Qwen2.5-1.5B"),
        (["train", "--config"], "--config: expected one argument"),
        (["train", "one.yaml", "--config", "two.yaml"], "there are two recipes, one.yaml and two.yaml"),
        (["train", "--layers", "all", "recipe.yaml"], "the recipe comes first, then its keys"),
        (
            ["train", "--model_name_or_path", "tiny:student"],
            "the command line names no teacher_model_name_or_path",
        ),
        (["train", "--lr", "1"], "or learning_rate?"),
        (["train", "--model", "x"], "did you mean model_init_kwargs or model_name_or_path or"),
        (["train", "--num_prompts", "9"], "num_prompts is a key of oprd bridge, not of oprd train"),
        (["bridge", "--learning_rate", "1"], "learning_rate is a key of oprd train, not of oprd bridge"),
        (["train", "--help", "recipe.yaml"], "invalid choice: 'recipe.yaml' (choose from 'all')"),
        (["eval", "--model", "tiny:student"], "--data"),
        (
            ["eval", "--model", "tiny:student", "--data", "tiny", "--output", "x", "--colour", "red"],
            "--colour",
        ),
        (["eval", "--model", "tiny:student", "--data", "tiny", "--output", "x", "--samples", "0"], "samples"),
        (["demo", "--steps", "0"], "--steps"),
        (
            ["eval", "--model", "tiny:student", "--data", "tiny", "--output", "x", "--dtype", "int3"],
            "--dtype",
        ),
        (["eval", "--model", "./nowhere", "--data", "tiny", "--output", "x"], "./nowhere"),
        ([*EVALUATION, "--engine", "sglang"], "--engine"),
        (
            [*EVALUATION, "--vllm_server_base_url", "http://127.0.0.1:9"],
            "no vLLM server answers at http://127",
        ),
        ([*EVALUATION, "--vllm_server_base_url", "localhost"], "no vLLM server answers at localhost"),
        ([*EVALUATION, "--engine", "hf", "--vllm_server_base_url", "http://127.0.0.1:9"], "drop one of them"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(capsys, argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("vanila.yaml", None, "did you mean vanilla.yaml?"),
        (".", None, "it is a folder: name one of its files vanilla.yaml"),
        ("model", "config.json", "holds a model: name that by --model_name_or_path model"),
        ("empty", "notes.txt", "it is a folder without a YAML file"),
        ("train.py", "import oprd\n", "a recipe is a YAML file"),
        ("resolved.yaml", "git_commit: x\nsettings: {}\n", "is no recipe, but what a run was started with"),
        ("fsdp.yaml", "compute_environment: x\n", "is no recipe, but a configuration of accelerate"),
        ("rank.yaml", "model_name_or_path: x\nrank: 4\n", "rank.yaml: rank is a key of oprd bridge, not of"),
    ],
)
def test_what_else_stands_in_a_recipes_place(capsys, tmp_path, monkeypatch, name, content, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vanilla.yaml").write_text("layers: all\n")
    if content and "." in name:
        (tmp_path / name).write_text(content)
    elif content:
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("{}")
    for argv in (["train", name], ["doctor", "--config", name]):
        assert says in refused(capsys, argv)


def help_of(capsys, *argv):
    assert cli.run(argv) == 0
    return capsys.readouterr().out


OF_THE_COMMAND = {"train": {"config", "accelerate_config", "num_processes"}, "bridge": {"config"}}


@pytest.mark.parametrize(
    ("command", "kinds"), [("train", (RunArguments, OPRDConfig)), ("bridge", (BridgeArguments,))]
)
@pytest.mark.parametrize("width", [80, 120])
def test_help_shows_every_key_of_ours_once(capsys, monkeypatch, command, kinds, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = help_of(capsys, command, "--help")
    shown = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    ours = {
        field.name for kind in (ObjectiveSettings, RunArguments, BridgeArguments) for field in fields(kind)
    }
    ours &= {field.name for kind in kinds for field in fields(kind)}
    assert ours <= set(shown) and len(shown) == len(set(shown))
    assert max(len(line) for line in text.splitlines()) <= width
    everything = help_of(capsys, command, "--help", "all")
    told = {field.name for kind in kinds for field in fields(kind) if field.init and "help" in field.metadata}
    assert set(re.findall(r"^  --(\w+)", everything, re.MULTILINE)) == told | OF_THE_COMMAND[command]


def test_help_tells_what_a_key_is_and_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = help_of(capsys, "help", "train")
    for line in (
        "--model_name_or_path TEXT     Student: a Hub name, a folder or tiny:student. (required)",
        "--learning_rate X             Peak learning rate of AdamW. (default: 1e-05)",
        "--lora_alpha N                Adapters are scaled by lora_alpha / lora_r. (default: 32)",
        "--max_prompt_length N         Drop (never cut) prompts of more tokens than this.\n",
        "--gradient_checkpointing BOOL\n"
        f"{' ' * 32}Enable gradient checkpointing to trade compute for memory. (default: true)",
    ):
        assert f"  {line}" in text
    titles = re.findall(r"^([a-zA-Z, ]+):$", text, re.MULTILINE)
    assert titles[:5] == ["options", "models", "data", "objective", "rollouts"]
    assert "--ranks N" in help_of(capsys, "doctor", "-h") and "--layers" in help_of(capsys, "doctor", "-h")


def test_versions_and_commands(capsys):
    assert re.fullmatch(
        r"oprd \d\S+ \(torch \S+, trl \S+, transformers \S+\)\n", help_of(capsys, "--version")
    )
    for argv in (["--help"], ["help"]):
        text = help_of(capsys, *argv)
        assert all(f"\n    {command} " in text for command in cli.COMMANDS)
    assert "responses per problem: the k of Avg@k (default: 16)" in " ".join(
        help_of(capsys, "help", "eval").split()
    )


def test_a_recipe_by_config_and_none_at_all(capsys, recipe, tmp_path):
    path, flags = recipe(max_steps=0.5), []
    assert "max_steps" in refused(capsys, ["train", "--config", path])
    for key, value in (RECIPE | {"layers": "1,9", "output_dir": tmp_path / "run"}).items():
        flags += [f"--{key}", str(value)]
    assert "layer 9" in refused(capsys, ["train", *flags])
    assert not (tmp_path / "run").exists()


@WITHOUT_VLLM
@pytest.mark.parametrize("command", ["train", "bridge", "eval"])
def test_vllm_that_is_asked_for_and_missing(capsys, recipe, tmp_path, command):
    bridge = {key: RECIPE[key] for key in list(RECIPE)[:3]} | {"output_dir": str(tmp_path / "run")}
    (tmp_path / "bridge.yaml").write_text(yaml.safe_dump(bridge))
    argv = {
        "train": ["train", recipe(), "--use_vllm", "true"],
        "bridge": ["bridge", str(tmp_path / "bridge.yaml"), "--engine", "vllm"],
        "eval": [*EVALUATION[:-1], str(tmp_path / "run"), "--engine", "vllm"],
    }
    assert "there is no vLLM: install it with" in refused(capsys, argv[command])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA a server can be handed weights")
def test_training_against_a_server_needs_cuda(capsys, recipe, tmp_path):
    said = refused(capsys, ["train", recipe(use_vllm=True, vllm_mode="server")])
    assert "vllm_mode: server" in said and "needs CUDA" in said
    assert not (tmp_path / "run").exists()


def on_two_ranks(*command):
    """A command of the shell on both; what was written to stdout and stderr, and the launcher's exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, "--no-python", *command], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr, done.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistaken", "said"),
    [
        pytest.param("01", "oprd: layers='9'", marks=pytest.mark.drill),
        pytest.param("0", "oprd: layers='9'", marks=pytest.mark.drill),
        ("1", "[rank 1] oprd: layers='9'"),
    ],
)
def test_of_several_ranks_one_tells_the_mistake(recipe, tmp_path, mistaken, said):
    for rank in "01":
        layers = "9" if rank in mistaken else "all"
        (tmp_path / f"{rank}.yaml").write_text(Path(recipe(layers=layers, ddp_backend="gloo")).read_text())
    each = f"exec {sys.executable} -m oprd.cli train {tmp_path}/$RANK.yaml"
    _, errors, code = on_two_ranks("sh", "-c", each)
    assert code == 1
    told = [line for line in errors.splitlines() if "layer 9" in line]
    assert len(told) == 1 and told[0].startswith(said), errors
    assert (tmp_path / "run").exists() == (mistaken == "1")  # the first rank owns it


@pytest.mark.drill
def test_of_several_ranks_one_tells_where_the_run_is(recipe, tmp_path):
    train = ["train", recipe(max_steps=1, ddp_backend="gloo")]
    output, errors, code = on_two_ranks(sys.executable, "-m", "oprd.cli", *train)
    assert code == 0, errors[:3000]
    assert output == f"the run is in {tmp_path}/run\n"


def test_malformed_yaml_and_unknown_flags(capsys, recipe, tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("layers: [1\npositions: all\n")
    assert "line 2" in refused(capsys, ["train", str(broken)])
    assert "--layrs" in refused(capsys, ["train", recipe(), "--layrs", "all"])


def test_a_run_from_start_to_finish(capsys, recipe, tmp_path):
    path, run = recipe(), tmp_path / "run"
    assert cli.run(["train", path]) == 0
    files = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "resolved.yaml"}
    assert files <= {file.name for file in run.iterdir()}
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    card = (run / "README.md").read_text()
    assert "2606.06021" in card and "layers: all" in card and "`tiny:teacher`" in card
    assert "on-policy representation distillation (OPRD)" in card and "None" not in card

    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    assert cli.run(["train", path]) == 0
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before

    capsys.readouterr()
    assert "layers" in refused(capsys, ["train", path, "--layers", "last"])
    assert "learning_rate" in refused(capsys, ["train", path, "--learning_rate", "0.5"])
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before

    assert cli.run(["train", path, "--max_steps", "3"]) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_eval_writes_a_summary(tmp_path, capsys):
    output = tmp_path / "eval"
    argv = ["eval", "--model", "tiny:teacher", "--data", "tiny", "--output", str(output)]
    assert cli.run([*argv, "--limit", "4", "--samples", "2", "--max_new_tokens", "48"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["num_problems"] == 4 and summary["avg_at_k"] > 0.7
    assert summary["no_answer_share"] == 0
    assert len((output / "samples.jsonl").read_text().splitlines()) == 4
    shown = capsys.readouterr().out
    low, high = summary["ci95"]
    assert "Avg@2" in shown and f"{low:.1%}–{high:.1%}" in shown and "no answer" in shown
    assert "pass@2" in shown and str(output) in shown and "--prompt_suffix" not in shown


@pytest.mark.parametrize("values", [["--temperature", "inf"], ["--top_p", "0"], ["--seed", "-1"]], ids=str)
def test_values_of_an_evaluation_are_checked_before_anything_is_loaded(capsys, tmp_path, values):
    output = str(tmp_path / "eval")
    said = refused(capsys, ["eval", "--model", "nowhere", "--data", "none", "--output", output, *values])
    assert f"{values[0][2:]} must be" in said


def stop_at_call(monkeypatch, owner, name, number):
    """SIGTERM in the `number`-th call of a method."""
    method, calls = getattr(owner, name), []

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


def test_a_stopped_evaluation_says_where_it_goes_on(capsys, tmp_path, monkeypatch):
    argv = ["eval", "--model", "tiny:student", "--data", "tiny", "--output", str(tmp_path), "--limit", "6"]
    argv += ["--samples", "2", "--batch_size", "4", "--max_new_tokens", "4"]
    stop_at_call(monkeypatch, HFEngine, "generate", 3)
    assert cli.run(argv) == 143
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "oprd: stopped with 4 problems done: the same command goes on from there"
    assert cli.run(argv) == 0
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6


def test_a_stopped_bridge_starts_over(capsys, tmp_path, monkeypatch):
    output = tmp_path / "bridge"
    argv = ["bridge", "recipes/tiny/bridge.yaml", "--output_dir", str(output), "--num_prompts", "32"]
    stop_at_call(monkeypatch, HFEngine, "generate", 2)
    assert cli.run([*argv, "--batch_size", "8", "--max_completion_length", "8"]) == 143
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "oprd: stopped before the bridge was complete: the same command starts over"
    assert not output.exists()


def test_faults_exit_with_1(capsys, recipe, tmp_path):
    from oprd.models.loading import load_model, load_tokenizer

    teacher = load_model("tiny:teacher", dtype="float32")
    teacher.model.layers[1].mlp.down_proj.weight.data[0] = 3e38  # a number, whose products are none
    teacher.save_pretrained(tmp_path / "broken")
    load_tokenizer("tiny:teacher").save_pretrained(tmp_path / "broken")
    assert cli.run(["train", recipe(teacher_model_name_or_path=str(tmp_path / "broken"))]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 1" in last and "[2, 3, 4]" in last and "Compute" in last


def test_a_schedule_that_ends_at_zero_ends_the_run_quietly(recipe, tmp_path):
    assert cli.run(["train", recipe(representation_weight="0=1,1=0")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss/total"] > 0 and records[1]["loss/total"] == 0
    assert "loss/representation" not in records[1]


@pytest.mark.parametrize("command", ["train", "dry_run", "doctor", "bridge", "eval"])
def test_a_prompt_that_the_template_refuses_is_one_line(recipe, tmp_path, capsys, command):
    """The bundled templates cannot write a message without content."""
    data, output = tmp_path / "rows.jsonl", tmp_path / "run"
    question = {"role": "user", "content": "Compute 1+2."}
    calls = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    called = [question, calls, {"role": "tool", "content": "three"}]
    prompts = [[question]] * 5 + [called]
    rows = [{"prompt": prompt, "solution": "3"} for prompt in prompts]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if command == "eval":
        argv = ["eval", "--model", "tiny:student", "--data", str(data), "--output", str(output)]
    elif command == "bridge":
        keys = ("model_name_or_path", "teacher_model_name_or_path")
        names = {"dataset_name": str(data), "output_dir": str(output)}
        bridge = tmp_path / "bridge.yaml"
        bridge.write_text(yaml.safe_dump({key: RECIPE[key] for key in keys} | names))
        argv = ["bridge", str(bridge)]
    else:
        argv = ["doctor" if command == "doctor" else "train", recipe(dataset_name=str(data))]
        argv += ["--dry_run", "true"] if command == "dry_run" else []
    said = refused(capsys, argv)
    assert (
        "row 5 ('three'): " in said
        and "chat template refuses it" in said
        and "no attribute 'content'" in said
    )
    assert said.endswith("drop_unrenderable_prompts: true") is (command != "eval")
    assert not output.exists()


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, capsys):
    (tmp_path / "settings.json.tmp").symlink_to("/dev/full")
    evaluation = [*EVALUATION[:-1], str(tmp_path), "--limit", "1", "--samples", "1", "--max_new_tokens", "2"]
    assert cli.run([*evaluation, "--engine", "hf"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = f"oprd: the run failed: [Errno 28] No space left on device: '{tmp_path}/settings.json'"
    assert error.strip().splitlines()[-1] == line


@pytest.mark.parametrize(("kind", "shows"), [(Fault, False), (BrokenPipeError, False), (RuntimeError, True)])
def test_a_fault_whose_words_say_all_shows_no_traceback(capsys, monkeypatch, kind, shows):
    def fail(*_):
        raise kind("the weights are not finite")

    monkeypatch.setitem(cli.COMMANDS, "tiny", fail)
    assert cli.run(["tiny", "build"]) == 1
    error = capsys.readouterr().err
    assert error.endswith("oprd: the run failed: the weights are not finite\n")
    assert ("Traceback" in error) is shows


@pytest.mark.parametrize("name", ["", "runs/\udcff"], ids=["empty", "no UTF-8"])
@pytest.mark.parametrize("command", ["train", "eval", "demo"])
def test_what_is_no_name_of_an_output_folder(capsys, recipe, tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    argv = {
        "train": ["train", recipe(), "--output_dir", name],
        "eval": [*EVALUATION[:-1], name],
        "demo": ["demo", "--output", name],
    }
    before = list(tmp_path.iterdir())
    assert "folder" in refused(capsys, argv[command])
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", ["[" * 10**5, '{"a": ' + "1" * 5000 + "}"], ids=["deep", "long"])
def test_json_that_python_does_not_read(capsys, value):
    assert "--chat_template_kwargs" in refused(capsys, [*EVALUATION, "--chat_template_kwargs", value])


def test_an_open_progress_bar_does_not_hide_the_error(capsys, monkeypatch):
    def fail(*_):
        bar = tqdm(total=9, desc="rollouts", file=sys.stderr)
        bar.update(3)
        raise UserError("what is wrong")

    monkeypatch.setitem(cli.COMMANDS, "tiny", fail)
    assert cli.run(["tiny", "build"]) == 2
    gc.collect()
    error = capsys.readouterr().err
    assert "rollouts" in error and error.endswith("\noprd: what is wrong\n")
