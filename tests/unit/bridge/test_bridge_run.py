"""`oprd bridge` from recipe to folder: what it writes, that it is the fit by hand, and what it refuses."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import reference_fit
from oprd.bridge import Bridge
from oprd.bridge.from_rollouts import ModelPair, _fitting_sampling
from oprd.bridge.identity import identity
from oprd.bridge.plots import _ranks
from oprd.bridge.recipe import BridgeArguments, parse_bridge_recipe
from oprd.cli import commands as cli
from oprd.folders.lock import LOCK_FILE, Holder
from oprd.foundation.errors import UserError
from oprd.foundation.ranks import Ranks
from oprd.models.loading import TINY_MODELS
from oprd.models.tiny import tokenizer as designs
from oprd.models.tiny.tokenizer import train_tokenizer
from oprd.rollouts.generation import HFEngine, Sampling, generate
from oprd.rollouts.prompts import load_prompts
from oprd.text.alignment import align_tokens, row_pairs
from places import TINY_RECIPES

RECIPE = {
    "model_name_or_path": "tiny:student",
    "teacher_model_name_or_path": "tiny:bridge-teacher",
    "dataset_name": "tiny",
    "rank": 4,
    "num_prompts": 40,
    "max_completion_length": 48,
    "batch_size": 16,
    "dtype": "float32",
}
PAIRS = {1: 1, 2: 3, 3: 4, 4: 6}  # Eq. 11 from four layers to six
FILES = {"bridge.safetensors", "report.json", "ranks.png", "directions.png", "cka.png", "resolved.yaml"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(folder, *flags, **changes)`: the exit code of `oprd bridge`; a change to None drops the key."""
    recipe = tmp_path_factory.mktemp("recipe") / "recipe.yaml"

    def start(folder, *flags, **changes):
        settings = RECIPE | {"output_dir": str(folder)} | changes
        recipe.write_text(
            yaml.safe_dump({key: value for key, value in settings.items() if value is not None})
        )
        return cli.run(["bridge", str(recipe), *flags])

    return start


@pytest.fixture(scope="module")
def fitted(run, tmp_path_factory):
    """The folder of the recipe above."""
    folder = tmp_path_factory.mktemp("runs") / "fitted"
    assert run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def translated(run, tmp_path_factory):
    """A teacher with another tokenizer and template."""
    folder = tmp_path_factory.mktemp("runs") / "translated"
    assert run(folder, teacher_model_name_or_path="tiny:tokenizer-teacher", all_pairs_gib=0) == 0
    return folder


def test_lengths_are_fitted_to_the_positions(run, tmp_path, capsys):
    assert run(tmp_path / "asked", "--max_completion_length", "512") == 2
    assert "max_completion_length is 512, but the student has 512 positions" in capsys.readouterr().err
    assert not (tmp_path / "asked").exists()
    names = {name: value for name, value in RECIPE.items() if name != "max_completion_length"}
    arguments = BridgeArguments(**names | {"rank": "4", "output_dir": str(tmp_path)})
    pair = ModelPair.load(arguments, torch.device("cpu"))
    assert _fitting_sampling(arguments, pair, [100]).max_new_tokens == 412
    assert _fitting_sampling(arguments, pair, [100, 200]).max_new_tokens == 312


def report(folder):
    return json.loads((folder / "report.json").read_text())


def snapshot(folder):
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def load(name, dtype="float32"):
    folder = TINY_MODELS / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, AutoTokenizer.from_pretrained(folder)


# By hand


@torch.no_grad()
def states(model, prompt, response):
    """`hidden_states` of one unpadded rollout, its rows: [L + 1, T, D]."""
    ids = torch.tensor([prompt + response])
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    rows = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    return np.stack([layer[0, rows].double().numpy() for layer in hidden])


def rollouts_by_hand():
    """The 40 chats of the run, and the responses that its seeds give."""
    student, tokenizer = load("student")
    chats = load_prompts("tiny").shuffle(seed=42).select(range(40))["prompt"]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    rollouts = []
    for start in range(0, 40, 16):
        batch = prompts[start : start + 16]
        rollouts += generate(student, tokenizer, batch, Sampling(48, 1.0, 1.0), 42 + start)
    return list(zip(chats, rollouts, strict=True))


def rows_by_hand(rollouts, teacher_name, final_norm=True, last=None):
    """Both models' states of the (last) rows that have read the same text: [L + 1, N, D] each."""
    (student, tokenizer), (teacher, theirs) = load("student"), load(teacher_name)
    if not final_norm:
        student.model.norm = teacher.model.norm = torch.nn.Identity()
    ours, wanted = [], []
    for chat, rollout in rollouts:
        prompt, read = rollout.prompt_ids, rollout.response_ids
        pairs = [(t, t) for t in range(len(read))]
        if teacher_name == "tokenizer-teacher":
            prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            text = tokenizer.decode(rollout.response_ids, skip_special_tokens=True)
            end = [] if rollout.truncated else [theirs.eos_token_id]
            read = theirs(text, add_special_tokens=False)["input_ids"] + end
            tokens = align_tokens(tokenizer, rollout.response_ids, theirs, read)
            pairs = row_pairs(tokens, len(rollout.response_ids), len(read))
        i, j = map(list, zip(*pairs[-last:] if last else pairs, strict=True))
        ours.append(states(student, rollout.prompt_ids, rollout.response_ids)[:, i])
        wanted.append(states(teacher, prompt, read)[:, j])
    return np.concatenate(ours, axis=1), np.concatenate(wanted, axis=1)


@pytest.fixture(scope="module")
def rollouts():
    return rollouts_by_hand()


@pytest.fixture(scope="module")
def counts(rollouts):
    drawn = [rollout for _, rollout in rollouts]
    rows = sum(len(rollout.response_ids) for rollout in drawn)
    return {"rollouts": 40, "rows": rows, "truncated": sum(rollout.truncated for rollout in drawn)}


@pytest.fixture(scope="module")
def by_hand(rollouts):
    return rows_by_hand(rollouts, "bridge-teacher")


def assert_fitted(folder, student, teacher, pairs, rank):
    """The folder's projectors are PCA and least squares on these rows, whichever form was chosen."""
    bridge = Bridge.load(folder)
    assert dict(bridge.layer_map.pairs) == pairs
    for layer, other in pairs.items():
        projector, s, t = bridge.projectors[layer], student[layer], teacher[other]
        directions = reference_fit.principal_directions(t)[:rank]
        affine = report(folder)["layers"][str(layer)]["affine"]
        matrix, offset = reference_fit.least_squares(s, (t - t.mean(0)) @ directions.T, affine)
        expected = {"student": matrix, "offset": offset, "teacher": directions, "mean": t.mean(0)}
        for name, value in expected.items():
            given = getattr(projector, name).numpy()
            assert np.linalg.norm(given - value) <= 2e-4 * max(np.linalg.norm(value), 1e-3), (layer, name)


def test_projectors_are_those_of_a_fit_by_hand(fitted, by_hand):
    assert_fitted(fitted, *by_hand, PAIRS, 4)


def test_a_teacher_with_another_tokenizer(translated, rollouts, counts):
    """It reads its own template and tokens, and rows that have read the same text are paired."""
    student, teacher = rows_by_hand(rollouts, "tokenizer-teacher")
    assert_fitted(translated, student, teacher, PAIRS, 4)
    data, paired = report(translated)["data"], student.shape[1]
    assert data["paired_rows"] == paired == report(translated)["num_rows"]
    assert (
        data["invalid_utf8"] == data["collapsed_alignment"] == 0 and counts["rows"] == data["rows"] > paired
    )
    assert data["coverage"] == pytest.approx(paired / counts["rows"])
    assert set(report(translated)["cka"]) == {f"{s}={t}" for s, t in PAIRS.items()}  # all_pairs_gib: 0


def test_responses_that_end_with_another_eos(tmp_path):
    """What the student's generation config lists ends a response for the teacher as well."""
    model, tokenizer = load("student")
    other = tokenizer.pad_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    changes = {"model_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "bridge")}
    changes["teacher_model_name_or_path"] = "tiny:tokenizer-teacher"
    recipe.write_text(yaml.safe_dump(RECIPE | changes))
    pair = ModelPair.load(parse_bridge_recipe(recipe), torch.device("cpu"))
    ids = tokenizer("12+7", add_special_tokens=False)["input_ids"]
    for end in (tokenizer.eos_token_id, other):
        tensors, _ = pair.translation.responses(
            torch.tensor([[*ids, end]]), torch.ones(1, len(ids) + 1, dtype=torch.long)
        )
        assert tensors["ends_together"].tolist() == [True]
        assert tensors["teacher_completion_ids"][0, -1] == pair.teacher.tokenizer.eos_token_id


# What is written


def test_files(fitted):
    assert {path.name for path in fitted.iterdir()} == FILES
    for name in ("ranks", "directions", "cka"):
        assert (fitted / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_metadata(fitted, counts):
    stored = report(fitted)
    assert stored == Bridge.load(fitted).metadata
    assert stored["data"] == {"dataset": "tiny", "coverage": 1.0, "engine": "hf", **counts}
    for role, name in (("student", "student"), ("teacher", "bridge-teacher")):
        assert stored[role] == identity(*load(name)) | {"name": f"tiny:{name}"}
        assert stored[role] == identity(*load(name, "bfloat16")) | {"name": f"tiny:{name}"}
    assert (stored["student"]["num_layers"], stored["student"]["width"]) == (4, 128)
    assert (stored["teacher"]["num_layers"], stored["teacher"]["width"]) == (6, 160)
    reading = {"final_norm": True, "teacher_chat_template": "student", "teacher_tokenization": "own"}
    kwargs = {"chat_template_kwargs": {}, "teacher_chat_template_kwargs": {}}
    assert stored["reading"] == reading | kwargs
    assert stored["settings"].items() >= (RECIPE | {"rank": "4", "output_dir": str(fitted)}).items()
    assert stored["settings"] == yaml.safe_load((fitted / "resolved.yaml").read_text())["settings"]
    assert (stored["rank"], stored["num_rows"]) == (4, counts["rows"])
    for layer in stored["layers"].values():
        assert 0 < layer["num_held_out"] < layer["num_rows"] == counts["rows"]
        assert layer["rank"] == 4 and 0.5 < layer["cosine_at_rank"] <= 1


def test_cka_of_all_pairs(fitted, by_hand):
    student, teacher = by_hand
    stored = report(fitted)["cka"]
    assert set(stored) == {f"{s}={t}" for s in range(1, 5) for t in range(1, 7)}
    for pair, value in stored.items():
        s, t = map(int, pair.split("="))
        a, b = (x - x.mean(0) for x in (student[s], teacher[t]))
        norms = [np.linalg.norm(x.T @ y) for x, y in ((a, b), (a, a), (b, b))]
        assert value == pytest.approx(norms[0] ** 2 / (norms[1] * norms[2]), rel=1e-4)


def test_the_same_command_leaves_it_alone(run, fitted, capsys):
    before = snapshot(fitted)
    assert run(fitted) == 0
    assert snapshot(fitted) == before
    capsys.readouterr()
    for key, value in {"rank": 5, "seed": 1, "num_prompts": 41, "layers": "last", "batch_size": 8}.items():
        assert run(fitted, f"--{key}", str(value)) == 2
        assert f"holds a run with {key}: " in capsys.readouterr().err
    assert snapshot(fitted) == before


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("model_name_or_path", "weights"),
        ("teacher_model_name_or_path", "tokenizer"),
        ("dataset_name", "rows"),
    ],
)
def test_a_bridge_of_what_was_replaced_since_is_refused(run, fitted, tmp_path, capsys, key, part):
    folder = shutil.copytree(fitted, tmp_path / "again")
    record = yaml.safe_load((folder / "resolved.yaml").read_text())
    record["inputs"][key][part] = "another"
    (folder / "resolved.yaml").write_text(yaml.safe_dump(record))
    before = snapshot(folder)
    assert run(folder) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"whose {key}: {RECIPE[key]} has been changed since ({part}: another, now " in last
    assert snapshot(folder) == before


@pytest.mark.parametrize("how", ["cut", "zeroed"])
def test_a_bridge_that_was_changed_is_not_written_over_until_it_is_deleted(
    run, fitted, tmp_path, capsys, how
):
    """And is then fitted again, to the last bit."""
    folder = shutil.copytree(fitted, tmp_path / "again")
    (folder / "report.json").unlink()
    whole = (folder / "bridge.safetensors").read_bytes()
    kept = whole[: len(whole) // 2]
    (folder / "bridge.safetensors").write_bytes(kept if how == "cut" else kept.ljust(len(whole), b"\0"))
    before = snapshot(folder)
    assert run(folder) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{folder}/bridge.safetensors is damaged" in line
    assert line.endswith("fit the bridge again: delete bridge.safetensors and run the same command")
    assert snapshot(folder) == before
    (folder / "bridge.safetensors").unlink()
    assert run(folder) == 0
    assert {path.name for path in folder.iterdir()} == FILES
    whole, stored = (load_file(path / "bridge.safetensors") for path in (fitted, folder))
    assert stored.keys() == whole.keys() and all(torch.equal(stored[k], whole[k]) for k in whole)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"], ids=str)
def test_a_report_that_was_deleted_or_changed_is_written_again(run, fitted, tmp_path, caplog, content):
    folder = shutil.copytree(fitted, tmp_path / "again")
    (folder / "report.json").unlink()
    if content is not None:
        (folder / "report.json").write_bytes(content)
    assert run(folder) == 0
    assert "report.json is missing or was changed: it is written again" in caplog.text
    assert (folder / "report.json").read_bytes() == (fitted / "report.json").read_bytes()
    assert {path.name for path in folder.iterdir()} == FILES


def test_a_folder_in_use_is_refused(run, tmp_path, capsys):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        other = pool.apply(Holder.this_process, ("oprd bridge", tmp_path))
        (tmp_path / LOCK_FILE).write_text(json.dumps(asdict(other)))
        assert run(tmp_path) == 2
        assert f"is in use by oprd bridge (process {other.pid} on " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


# Choices


def test_a_model_and_itself(run, tmp_path):
    names = {"model_name_or_path": "tiny:student", "teacher_model_name_or_path": "tiny:student"}
    assert run(tmp_path / "run", "--layers", "best", "--max_rank", "16", "--rank", "auto", **names) == 0
    stored = report(tmp_path / "run")
    assert dict(Bridge.load(tmp_path / "run").layer_map.pairs) == {1: 1, 2: 2, 3: 3, 4: 4}
    for layer in stored["layers"].values():
        assert layer["rank"] == 16 and layer["cosine_at_rank"] == pytest.approx(1, abs=1e-5)
        assert min(layer["share"]) == pytest.approx(1, abs=1e-4)
    assert all(stored["cka"][f"{i}={i}"] == pytest.approx(1) for i in range(1, 5))


def test_best_layers_and_automatic_rank(run, tmp_path):
    flags = ["--layers", "best", "--rank", "auto", "--max_rank", "64", "--num_generations", "2"]
    assert run(tmp_path / "run", *flags, "--num_prompts", "20") == 0
    bridge, stored = Bridge.load(tmp_path / "run"), report(tmp_path / "run")
    teachers = [teacher for _, teacher in bridge.layer_map.pairs]
    assert bridge.layer_map.student_layers == (1, 2, 3, 4) and teachers == sorted(teachers)
    assert stored["data"]["rollouts"] == 40
    for layer, rank in bridge.ranks.items():
        errors = stored["layers"][str(layer)]["error"]
        assert len(errors) == 65 and rank == int(np.argmin(errors)) > 4


def test_explicit_pairs_positions_and_reading(run, tmp_path, rollouts, counts):
    flags = ["--layers", "1=2,4=6", "--positions", "last=8", "--no_final_norm", "--affine", "false"]
    assert run(tmp_path / "run", *flags, "--rank", "2") == 0
    stored = report(tmp_path / "run")
    assert stored["reading"]["final_norm"] is False
    assert stored["num_rows"] == 40 * 8 and stored["data"]["rows"] == counts["rows"]
    assert not any(layer["affine"] for layer in stored["layers"].values())
    rows = rows_by_hand(rollouts, "bridge-teacher", final_norm=False, last=8)
    assert_fitted(tmp_path / "run", *rows, {1: 2, 4: 6}, 2)


@pytest.mark.parametrize("teacher", ["tiny:bridge-teacher", "tiny:tokenizer-teacher"])
def test_a_fitted_bridge_trains(run, tmp_path, teacher):
    """Fitted in the checkpoints' bfloat16 and trained through in float32: the models are the same."""
    names = {"model_name_or_path": "tiny:student", "teacher_model_name_or_path": teacher}
    assert run(tmp_path / "bridge", "--dtype", "auto", "--layers", "2,4", **names) == 0
    recipe = {
        **names,
        "dataset_name": "tiny",
        "bridge": str(tmp_path / "bridge"),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 48,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.run(["train", str(tmp_path / "train.yaml")]) == 0
    (record,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    layers = report(tmp_path / "bridge")["layers"].values()
    level = sum(layer["cosine_at_rank"] for layer in layers) / 2
    assert record["bridge/held_out_alignment"] == pytest.approx(level)
    assert record["bridge/alignment"] == pytest.approx(level, abs=0.05)
    assert record["loss/total"] == pytest.approx(2 - 2 * record["representation/cosine"], rel=1e-4)


# Refused, with nothing written


@pytest.fixture
def refused(run, tmp_path, capsys):
    """`refused(*flags, **changes)`: the last line of a command that exits with 2 and leaves no folder."""

    def start(*flags, **changes):
        assert run(tmp_path / "run", *flags, **changes) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and not (tmp_path / "run").exists()
        return error.strip().splitlines()[-1]

    return start


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_prompts": 3}, "3 prompts × 1 rollouts of 48 rows are 144 rows, and states 160 wide need"),
        ({"num_prompts": 2, "max_completion_length": 128}, "states 160 wide need at least 161: raise num_"),
        ({"num_prompts": 0}, "num_prompts must be 1 or more, got 0"),
        ({"num_generations": 0}, "num_generations must be 1 or more, got 0"),
        ({"batch_size": -1}, "batch_size must be 1 or more, got -1"),
        ({"num_prompt": 3}, "unknown key 'num_prompt'; did you mean num_prompts"),
        ({"model_name_or_path": None}, "names no model_name_or_path"),
        ({"teacher_model_name_or_path": None}, "names no teacher_model_name_or_path"),
        ({"dataset_name": None}, "names no dataset_name"),
        ({"output_dir": None}, "names no output_dir"),
        ({"model_name_or_path": "./nowhere"}, "the model folder ./nowhere does not exist"),
        ({"teacher_model_name_or_path": "tiny:nobody"}, "no bundled model tiny:nobody"),
        ({"rank": 0}, "rank: '0' is neither auto nor a whole number from 1 on"),
        ({"rank": -3}, "rank: '-3' is neither"),
        ({"rank": "many"}, "rank: 'many' is neither"),
        ({"rank": 2.5}, "rank: '2.5' is neither"),
        ({"rank": 161}, "rank 161 is above the teacher's width 160"),
        ({"max_rank": 0}, "max_rank must be 1 or more"),
        ({"affine": "perhaps"}, "affine: 'perhaps' is not one of auto, true, false"),
        ({"method": "lda"}, "lda"),
        ({"directions": "best"}, "directions"),
        ({"layers": "5"}, "the student has layers 1 to 4, and layer 5 is not one of them"),
        ({"layers": "1=7"}, "the teacher has layers 1 to 6"),
        ({"layers": "best", "all_pairs_gib": 0.001}, "layers: best compares all layers, which needs 0.00"),
        ({"holdout": 1.0}, "holdout must be 0 or more and below 1, got 1.0"),
        ({"holdout": 0, "rank": "auto"}, "no rollouts to choose by"),
        ({"holdout": 0, "layers": "best"}, "no rollouts to choose by"),
        ({"positions": "middle"}, "positions 'middle'"),
        ({"temperature": -1}, "temperature must be 0 or more, got -1.0"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"max_completion_length": 0}, "max_completion_length"),
        ({"max_prompt_length": 3}, "max_prompt_length=3"),
        ({"dtype": "float17"}, "dtype"),
        ({"teacher_chat_template": "hers"}, "teacher_chat_template"),
        ({"teacher_tokenization": "hers"}, "teacher_tokenization"),
        ({"dataset_name": "./nothing.jsonl"}, "./nothing.jsonl: no such file"),
        ({"dataset_train_split": "tset"}, "tiny has the splits"),
    ],
    ids=str,
)
def test_mistakes(refused, changes, says):
    assert says in refused(**changes)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--chat_template_kwargs", "{broken"], "chat_template_kwargs: '{broken' is not JSON"),
        (["--chat_template_kwargs", "[1]"], "is not a mapping"),
        (["--bridge", "x"], "bridge is a key of oprd train, not of oprd bridge"),
        (["--rank"], "rank"),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(refused, flags, says):
    assert says in refused(*flags)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut.jsonl", '{"prompt": "What is 1?"}\n{"prompt": "Wh', "line 2"),
        ("cut.parquet", "PAR1", "cannot be read as parquet"),
        ("empty.jsonl", "", "has no rows"),
        ("other.jsonl", '{"question": "?"}\n', "prompt"),
    ],
)
def test_mistakes_in_a_dataset(refused, tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    assert says in refused(dataset_name=str(tmp_path / name))


def test_ids_outside_the_teachers_vocabulary(refused, tmp_path):
    """The student's ids can only be fed to a teacher that has as many."""
    folder = shutil.copytree(TINY_MODELS / "tokenizer-teacher", tmp_path / "teacher")
    small = train_tokenizer(["a"], vocab_size=262, design=designs.PAIRS)
    small.save_pretrained(folder)
    config = Qwen3Config.from_pretrained(folder, vocab_size=len(small))
    Qwen3ForCausalLM(config).save_pretrained(folder)
    line = refused("--teacher_tokenization", "student", teacher_model_name_or_path=str(folder))
    assert "vocabulary" in line


def test_a_folder_of_a_training_run_is_refused_although_it_has_settings(run, fitted, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(fitted / "resolved.yaml", folder)
    (folder / "metrics.jsonl").write_text("")
    assert run(folder) == 2
    assert "holds metrics.jsonl, which is not of this command" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["bridge.safetensors", "config.json", "report.json", "summary.json"])
def test_a_foreign_folder(run, fitted, tmp_path, capsys, content):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / content).write_bytes((fitted / "bridge.safetensors").read_bytes())
    before = snapshot(folder)
    assert run(folder) == 2
    assert "choose another output_dir" in capsys.readouterr().err
    assert snapshot(folder) == before


def test_what_is_printed(run, fitted, capsys):
    assert run(fitted) == 0  # a finished folder is shown again
    out = capsys.readouterr().out
    stored = json.loads((fitted / "report.json").read_text())
    lines = [line.strip("│") for line in out.splitlines() if "│" in line]
    rows = [[cell.strip() for cell in line.split("│")] for line in lines]
    assert rows == [
        [layer, str(report["teacher_layer"]), "4", f"{report['cosine_at_rank']:.3f}", f"{report['cka']:.3f}"]
        for layer, report in stored["layers"].items()
    ]
    assert f"{stored['num_rows']:,} rows of 40 rollouts; 100.0% of the student's rows" in out


def test_too_few_rows_are_told_before_the_rollouts(run, tmp_path, capsys, monkeypatch):
    drawn = []
    generate_ = HFEngine.generate

    def note(self, prompts, *rest):
        drawn.append(len(prompts))
        return generate_(self, prompts, *rest)

    monkeypatch.setattr(HFEngine, "generate", note)
    assert run(tmp_path / "run", num_prompts=3) == 2 and drawn == []
    # 200 tokens would do, but a response takes about 40: the first batch shows it.
    assert run(tmp_path / "run", num_prompts=1, max_completion_length=200) == 2
    assert drawn == [1]
    assert "need at least 161" in capsys.readouterr().err


@pytest.mark.parametrize("depth", [4, 30])
def test_many_layers_share_a_colour_bar(fitted, depth, tmp_path):
    stored = json.loads((fitted / "report.json").read_text())
    reports = list(stored["layers"].values())
    layers = {str(i + 1): reports[i % len(reports)] for i in range(depth)}
    figure = _ranks({int(layer): report for layer, report in layers.items()})
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [name for name in named if name.startswith("layer ")] == (
        [f"layer {i + 1}" for i in range(depth)] if depth == 4 else []
    )
    assert len(figure.axes) == (2 if depth == 4 else 3)


@pytest.mark.slow
def test_two_ranks_fit_the_bridge_of_one(tmp_path):
    """40 prompts in batches of 7: rank 0 has one batch more, and the last one is short."""
    recipe = tmp_path / "recipe.yaml"
    changes = {"batch_size": 7, "rank": "auto", "engine": "hf"}
    teacher = {"teacher_model_name_or_path": "tiny:tokenizer-teacher"}
    recipe.write_text(yaml.safe_dump(RECIPE | changes | teacher))
    command = ["bridge", str(recipe), "--output_dir"]
    assert cli.run([*command, str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "oprd.cli", *command, str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bridge and report:") == 1  # told by one of them
    for folder in ("one", "two"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == FILES
    one, two = (load_file(tmp_path / folder / "bridge.safetensors") for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    reports = [json.loads((tmp_path / folder / "report.json").read_text()) for folder in ("one", "two")]
    for report in reports:
        report["settings"].pop("output_dir")
        assert report["data"]["invalid_utf8"] == 0  # a count that ranks may lose when they add up theirs
    same_numbers(*reports)


def same_numbers(one, two, where="report"):
    """Equal but for rounding, through dictionaries and lists."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one:
            same_numbers(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for i, pair in enumerate(zip(one, two, strict=True)):
            same_numbers(*pair, f"{where}[{i}]")
    else:
        assert two == (pytest.approx(one, rel=1e-4, abs=1e-6) if isinstance(one, float) else one), where


def test_an_engine_in_the_process_is_refused_among_ranks():
    args = parse_bridge_recipe(TINY_RECIPES / "bridge.yaml", ["--engine", "vllm"])
    pair = ModelPair.load(args, torch.device("cpu"))
    with pytest.raises(UserError, match="engine: vllm works in one process only"):
        pair.engine(args, Ranks(0, 2))
