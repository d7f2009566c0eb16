"""Models of the Hub, from a cache that stands for it: revisions, and code that comes with a model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merged import merged_weights
from oprd.evaluation.evaluate import evaluate
from oprd.evaluation.problems import EvalSettings
from oprd.foundation.errors import UserError
from oprd.models.loading import load_model, load_tokenizer, resolve_model
from oprd.rollouts.generation import Sampling
from oprd.rollouts.prompts import load_prompts
from tiny_pair import QUICK

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
CODE = """from transformers import Qwen3ForCausalLM


class Tripled(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output
"""
OWN_KIND = """from transformers import Qwen2Config, Qwen2ForCausalLM


class OwnConfig(Qwen2Config):
    model_type = "own"


class Own(Qwen2ForCausalLM):
    config_class = OwnConfig
"""
OWN_CLASSES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
DRAWS = ["--limit", "3", "--samples", "2", "--max_new_tokens", "8", "--engine", "hf", "--data", "tiny"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, student, teacher):
    """A cache with org/model, whose branch v2 is another one than main; the environment that names it."""
    cache = tmp_path_factory.mktemp("cache")
    model = cache / "models--org--model"
    (model / "refs").mkdir(parents=True)
    for (branch, commit), folder in zip(COMMITS.items(), (student, teacher), strict=True):
        (model / "refs" / branch).write_text(commit)
        shutil.copytree(folder, model / "snapshots" / commit)
    return {"HF_HUB_CACHE": str(cache), "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("code"))}


IN_TURN = """
import contextlib, io, json, sys
from oprd.cli import commands as cli

said = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as error:
        code = cli.run(argv)
    said.append((code, error.getvalue().strip()))
print(json.dumps(said))
"""


def run(hub, *commands):
    """Commands in turn, in one process that takes the cache for the Hub; exit codes and what was said."""
    argv = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, argv],
        env=os.environ | hub,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def succeed(hub, *commands):
    for code, said in run(hub, *commands):
        assert code == 0, said[-3000:]


def fingerprint(folder):
    return json.loads((folder / "summary.json").read_text())["settings"]["model_fingerprint"]


@pytest.mark.slow
def test_an_evaluation_of_a_revision(hub, tmp_path, student, teacher):
    wanted = [
        evaluate(
            load_model(folder),
            load_tokenizer(folder),
            load_prompts("tiny", "test").select(range(3)),
            EvalSettings(samples=2, sampling=Sampling(8)),
            progress=False,
        )
        for folder in (student, teacher)
    ]
    evaluation = ["eval", "--model", "org/model", *DRAWS]
    *done, (code, said) = run(
        hub,
        *([*evaluation, "--revision", branch, "--output", tmp_path / branch] for branch in COMMITS),
        [*evaluation, "--output", tmp_path / "none"],
        [*evaluation, "--revision", "v3", "--output", tmp_path / "v3"],
    )
    assert [code for code, _ in done] == [0, 0, 0], done
    for branch, summary in zip(COMMITS, wanted, strict=True):
        assert fingerprint(tmp_path / branch) == summary["settings"]["model_fingerprint"]
    assert fingerprint(tmp_path / "none") == fingerprint(tmp_path / "main") != fingerprint(tmp_path / "v2")
    assert code == 2 and said.startswith("oprd: cannot load the model org/model: ")


@pytest.mark.drill
def test_an_evaluation_of_a_model_with_code_of_its_own(hub, tmp_path, student):
    folder = Path(shutil.copytree(student, tmp_path / "model"))
    (folder / "tripled.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "tripled.Tripled"}, "architectures": ["Tripled"]}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3"}))
    succeed(hub, ["eval", "--model", folder, "--output", tmp_path / "eval", *DRAWS, "--trust_remote_code"])
    samples = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    tripled = load_model(student)
    with torch.no_grad():
        tripled.lm_head.weight *= 3
    wanted = tmp_path / "wanted"
    evaluate(
        tripled,
        load_tokenizer(student),
        load_prompts("tiny", "test").select(range(3)),
        EvalSettings(samples=2, sampling=Sampling(8)),
        wanted,
        progress=False,
    )
    assert samples == [json.loads(line) for line in (wanted / "samples.jsonl").read_text().splitlines()]


@pytest.fixture
def own_kind(tmp_path, make_folder):
    """A student of a kind that nobody knows, with its code; else `make_folder(1, family="qwen2")`."""
    folder = Path(shutil.copytree(make_folder(1, family="qwen2"), tmp_path / "model"))
    (folder / "own.py").write_text(OWN_KIND)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": OWN_CLASSES, "architectures": ["Own"], "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_nobody_is_asked_whether_to_run_code(own_kind, capsys):
    with pytest.raises(UserError, match="and set trust_remote_code to have it run"):
        resolve_model(str(own_kind))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_student_of_a_kind_of_its_own_trains_where_its_code_is_trusted(
    hub, tmp_path, make_folder, own_kind
):
    names = {"teacher_model_name_or_path": make_folder(2, family="qwen2"), "dataset_name": "tiny"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names))
    train = ["train", tmp_path / "recipe.yaml", "--max_steps", "1"]
    own, plain = (["--model_name_or_path", path] for path in (own_kind, make_folder(1, family="qwen2")))
    (code, said), *done = run(
        hub,
        [*train, *own, "--output_dir", tmp_path / "refused"],
        [*train, *own, "--output_dir", tmp_path / "own", "--trust_remote_code", "true"],
        [*train, *plain, "--output_dir", tmp_path / "plain"],
    )
    why = "it needs code that comes with it: read that, and set trust_remote_code to have it run"
    assert (code, said) == (2, f"oprd: cannot load the model {own_kind}: {why}")
    assert not (tmp_path / "refused").exists()
    assert [code for code, _ in done] == [0, 0], done
    folders = tmp_path / "own", tmp_path / "plain", own_kind
    own, plain, before = (load_file(folder / "model.safetensors") for folder in folders)
    assert own.keys() == plain.keys() and all(torch.equal(own[name], plain[name]) for name in own)
    assert any(not torch.equal(own[name], before[name]) for name in own)
    assert (tmp_path / "own" / "own.py").read_text() == OWN_KIND
    saved = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (saved["model_type"], saved["auto_map"]) == ("own", OWN_CLASSES)


@pytest.mark.drill
@pytest.mark.parametrize("revision", [None, "v2"])
def test_adapters_are_merged_into_the_revision_they_were_trained_on(
    hub, tmp_path, student, teacher, revision
):
    names = {
        "model_name_or_path": "org/model",
        "teacher_model_name_or_path": teacher,
        "dataset_name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "use_peft": True,
        "lora_r": 4,
        "lora_alpha": 8,
    }
    more = {} if revision is None else {"model_init_kwargs": {"revision": revision}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names | more))
    succeed(hub, ["train", tmp_path / "recipe.yaml"])
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["revision"] == COMMITS[revision or "main"]
    wanted = merged_weights(tmp_path / "run", student if revision is None else teacher, rslora=False)
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    for name, weight in merged.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.drill
def test_a_plan_and_a_bridge_of_a_student_of_a_kind_of_its_own(hub, tmp_path, make_folder, own_kind):
    names = {
        "model_name_or_path": str(own_kind),
        "teacher_model_name_or_path": make_folder(2, family="qwen2"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(QUICK | names | {"dataset_name": "tiny"}))
    sizes = {"num_prompts": 8, "max_completion_length": 8, "rank": "2", "engine": "hf", "dtype": "float32"}
    (tmp_path / "bridge.yaml").write_text(yaml.safe_dump(names | sizes | {"dataset_name": "tiny"}))
    doctor = ["doctor", tmp_path / "recipe.yaml", "--output_dir", tmp_path / "run"]
    bridge = ["bridge", tmp_path / "bridge.yaml", "--output_dir", tmp_path / "bridge"]
    trusted = [[*command, "--trust_remote_code", "true"] for command in (doctor, bridge)]
    *refused, planned, fitted = run(hub, doctor, bridge, *trusted)
    for code, said in refused:
        assert code == 2 and "set trust_remote_code" in said.splitlines()[-1]
    assert planned[0] == fitted[0] == 0, (planned, fitted)
    assert (tmp_path / "bridge" / "report.json").is_file()
