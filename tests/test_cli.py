"""The command line as users meet it: exit codes, one clear last line, nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from oprd import cli
from oprd.engines.vllm import is_installed
from oprd.rollouts import HFEngine

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
        (["distil"], "distil"),
        (["train"], "recipe"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
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
    [("01", "oprd: layers='9'"), ("0", "oprd: layers='9'"), ("1", "[rank 1] oprd: layers='9'")],
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


@pytest.mark.slow
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


def test_eval_writes_a_summary(tmp_path):
    output = tmp_path / "eval"
    argv = ["eval", "--model", "tiny:teacher", "--data", "tiny", "--output", str(output)]
    assert cli.run([*argv, "--limit", "4", "--samples", "2", "--max_new_tokens", "48"]) == 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["num_problems"] == 4 and summary["avg_at_k"] > 0.7
    assert len((output / "samples.jsonl").read_text().splitlines()) == 4


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
    assert cli.run([*argv, "--batch_size", "8", "--max_completion_length", "4"]) == 143
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "oprd: stopped before the bridge was whole: the same command starts over"
    assert not output.exists()


def test_faults_exit_with_1(capsys, recipe, tmp_path):
    from oprd.models import load_model, load_tokenizer, resolve_model

    teacher = load_model(resolve_model("tiny:teacher"), dtype="float32")
    teacher.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    teacher.save_pretrained(tmp_path / "broken")
    load_tokenizer(resolve_model("tiny:teacher")).save_pretrained(tmp_path / "broken")
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
