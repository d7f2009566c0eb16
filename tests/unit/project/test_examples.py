"""The plain loop, the recipes and the real-prompt script do what their first lines say."""

import importlib.util
import json
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin

from oprd.bridge.recipe import parse_bridge_recipe
from oprd.cli.demo import at_share
from oprd.cli.demo_pairs import BRIDGE, PAIRS, SHARED
from oprd.preflight.doctor import examine
from oprd.training.train import parse_training_recipe
from places import ROOT

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")
REAL_PROMPTS = ROOT.parent / "shared" / "data" / "dapo-math-17k.parquet"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_learns():
    history = load(Path("examples/plain_loop.py")).distil(steps=6, batch_size=8)
    assert history[-1] < 0.8 * history[0]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec("".join(cell["source"]).replace("STEPS = 40", "STEPS = 3"), names)
    assert [record["step"] for record in names["steps"]] == [1, 2, 3]
    assert (tmp_path / "runs" / "quickstart-notebook" / "model.safetensors").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    if "num_prompts" in yaml.safe_load(path.read_text()):
        config = run = parse_bridge_recipe(path)
    else:
        run, config = parse_training_recipe(path)
    assert run.model_name_or_path and config.teacher_model_name_or_path
    assert config.output_dir.startswith("runs/")


def test_the_paper_recipe_has_the_papers_settings():
    run, config = parse_training_recipe(ROOT / "recipes" / "paper" / "vanilla.yaml")
    assert run.model_name_or_path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    assert (config.layers, config.positions, config.representation_loss) == ("all", "last=2000", "mse")
    assert config.max_steps == 500 and config.learning_rate == 1e-5 and config.warmup_steps == 0.03
    assert config.lr_scheduler_type == "cosine" and config.bf16 and config.temperature == 1.0
    on_8_gpus = 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert (on_8_gpus // config.num_generations, config.num_generations) == (8, 2)


def test_the_first_recipe_is_short_and_can_be_planned():
    """On the bundled models, since its own are on the Hub."""
    names = ["--model_name_or_path", "tiny:student", "--teacher_model_name_or_path", "tiny:teacher"]
    run, config = parse_training_recipe(
        ROOT / "recipes" / "first.yaml",
        [*names, "--dataset_name", "tiny", "--gradient_checkpointing", "false"],
    )
    rollouts = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert config.max_steps * rollouts * config.max_completion_length <= 20_000
    assert examine(run, config).is_well


@pytest.mark.parametrize(
    ("file", "pair", "arm"),
    [
        ("vanilla", "same", "oprd"),
        ("sampled_token", "same", "opd_sampled_token"),
        ("top_k", "same", "opd_top_k"),
        ("through_bridge", "bridge", "bridge"),
        ("bridge_then_opd", "bridge", "bridge_then_opd"),
        ("through_tokenizer_bridge", "tokenizer", "bridge"),
        ("sampled_text", "tokenizer", "opd_sampled_text"),
    ],
)
def test_tiny_recipes_are_the_arms_of_the_demo(file, pair, arm):
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny" / f"{file}.yaml").read_text())
    expected = SHARED | PAIRS[pair].arms[arm] | {"teacher_model_name_or_path": PAIRS[pair].teacher}
    for name in ("representation_weight", "output_weight"):
        if name in expected:
            expected[name] = at_share(expected[name], recipe["max_steps"])
    same = recipe.keys() & expected.keys() - {"save_strategy", "report_to", "diagnostics_steps", "bridge"}
    assert {key: str(recipe[key]) for key in same} == {key: str(expected[key]) for key in same}
    assert {"learning_rate", "positions", "per_device_train_batch_size"} <= same
    assert same >= PAIRS[pair].arms[arm].keys() - {"bridge"}


@pytest.mark.parametrize(("file", "pair"), [("bridge", "bridge"), ("tokenizer_bridge", "tokenizer")])
def test_tiny_bridges_are_those_of_the_demo(file, pair):
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny" / f"{file}.yaml").read_text())
    expected = BRIDGE | PAIRS[pair].bridges["fit"] | {"teacher_model_name_or_path": PAIRS[pair].teacher}
    assert {key: str(recipe[key]) for key in expected} == {key: str(v) for key, v in expected.items()}


@pytest.mark.skipif(not REAL_PROMPTS.exists(), reason="the real prompts are not part of the project")
def test_real_prompts(tmp_path):
    losses = load(Path("benchmarks/real_prompts.py")).run(REAL_PROMPTS, tmp_path, steps=4, width=64, depth=2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_takes_every_launcher(path):
    config = load_config_from_file(str(path))
    kind = {"one": "NO", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[
        path.stem.partition("_")[0]
    ]
    assert config.distributed_type.value == kind and config.mixed_precision == "bf16"
    assert config.num_processes == {"one_gpu": 1, "fsdp2_nodes": 16}.get(path.stem, 8)
    if kind == "FSDP":
        keys = {field.name for field in fields(FullyShardedDataParallelPlugin)}
        named = {name.removeprefix("fsdp_") for name in config.fsdp_config} - {"version", "offload_params"}
        assert config.fsdp_config["fsdp_version"] == 2 and named <= keys
    else:
        assert not config.fsdp_config


def test_the_slurm_script_is_a_script():
    script = ROOT / "recipes" / "accelerate" / "train.slurm"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert "recipes/accelerate/fsdp2_nodes.yaml" in script.read_text()
