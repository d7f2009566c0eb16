"""Run folders that somebody else, or a disk, has touched: what is repaired, what is refused, what is told."""

import json
import multiprocessing
import os
import shutil
from dataclasses import asdict

import pytest

from oprd.folders import lock
from oprd.folders.lock import LOCK_FILE, Holder
from oprd.folders.whole import SEAL_FILE, seal
from oprd.foundation.errors import UserError
from oprd.training.train import train
from run_folders import files, lasting, same_weights

# Finished models


def damage(file, how):
    """Write a file anew, but not as it was; two of the ways keep its size."""
    content = file.read_bytes()
    middle = len(content) // 2
    changes = {
        "cut": content[:-1],
        "zeroed": content[:middle] + bytes(len(content) - middle),
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
    }
    file.write_bytes(changes[how])


@pytest.mark.parametrize("how", ["cut", "zeroed", "flipped"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.json"])
def test_a_finished_model_that_was_changed_is_not_written_over(copied, recipe, name, how):
    """Whether a user has edited it or a disk; and nothing is trained."""
    damage(copied / name, how)
    before = files(copied)
    told = (
        rf"is finished, and {name} .*: it is not written over; .* or delete {name} to have it written again"
    )
    for flags in ([], ["--max_steps", "8"]):
        with pytest.raises(UserError, match=told):
            train(*recipe(copied, *flags))
    assert files(copied) == before


def test_a_card_is_everybodys_to_edit(copied, recipe):
    (copied / "README.md").write_text("# Mine")
    before = files(copied)
    train(*recipe(copied))
    assert files(copied) == before
    (copied / "README.md").unlink()
    train(*recipe(copied))
    assert files(copied).keys() == before.keys() - {copied / "README.md"}


def test_a_finished_run_needs_no_right_to_write(finished, recipe, monkeypatch):
    """It is neither locked nor probed."""
    monkeypatch.setattr("oprd.training.train.hold", None)
    assert train(*recipe(finished)) == finished


def test_a_finished_model_without_checkpoints_is_not_trained_anew(copied, recipe):
    shutil.rmtree(copied / "checkpoint-4")
    with pytest.raises(UserError, match=r"after 4 steps, .*start another run from it \(model_name"):
        train(*recipe(copied, "--max_steps", "8"))
    for step in (1, 2, 3):
        shutil.rmtree(copied / f"checkpoint-{step}")
    before = files(copied).keys()
    assert train(*recipe(copied)) == copied
    with pytest.raises(UserError, match="after 4 steps, and the checkpoint of its last step is gone"):
        train(*recipe(copied, "--max_steps", "8"))
    config = (copied / "config.json").rename(copied.parent / "config.json")
    with pytest.raises(UserError, match=r"is finished, but for config\.json, and the checkpoint of its last"):
        train(*recipe(copied))
    config.rename(copied / "config.json")
    (copied / SEAL_FILE).unlink()
    with pytest.raises(UserError, match=r"holds model\.safetensors and no whole checkpoint to go on from"):
        train(*recipe(copied))
    assert files(copied).keys() == before - {copied / SEAL_FILE}


# Checkpoints


@pytest.mark.parametrize("how", ["zeroed", "flipped"])
def test_a_checkpoint_that_was_changed_is_passed_over(copied, recipe, finished, caplog, how):
    """The weights of the newest keep their size, and so does the optimiser's state of the one before."""
    (copied / SEAL_FILE).unlink()
    damage(copied / "checkpoint-4" / "model.safetensors", how)
    damage(copied / "checkpoint-3" / "optimizer.pt", how)
    train(*recipe(copied))
    why = "was changed after it was written (another checksum)"
    for step, name in ((4, "model.safetensors"), (3, "optimizer.pt")):
        assert f"checkpoint-{step} is passed over: {name} {why}" in caplog.text
    assert lasting(copied) == lasting(finished)
    assert same_weights(copied, finished)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_whole_file_that_cannot_be_loaded_is_named(copied, recipe, name):
    """As one of another version, or one that was damaged under a seal of sizes alone."""
    checkpoint = copied / "checkpoint-3"
    shutil.rmtree(copied / "checkpoint-4")
    (copied / SEAL_FILE).unlink()
    (checkpoint / name).write_bytes(b"of another version")
    seal(checkpoint, [path for path in checkpoint.iterdir() if path.name != SEAL_FILE])
    told = rf"checkpoint-3: .*{name}.* cannot be loaded \(.*delete that checkpoint to go on from an older one"
    with pytest.raises(UserError, match=told):
        train(*recipe(copied))


# Metrics


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", '{"loss": 1}', '{"step": "4"}', '{"step": 1}', "\x00", '{"step": true}'),
        *('{"step": 4, "loss/total": "1"}', '{"step": 4, "rollout/mean_length": null}'),
    ],
    ids=range(9),
)
def test_an_alien_line_of_metrics_is_named_before_models_load(copied, recipe, monkeypatch, number, line):
    monkeypatch.setattr("oprd.training.train._make_trainer", None)
    (copied / SEAL_FILE).unlink()
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = line
    (copied / "metrics.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(
        UserError, match=rf"metrics\.jsonl, line {number} is not of a step after those before"
    ):
        train(*recipe(copied))


@pytest.mark.parametrize("kept", [[], [1, 3], [1, 2, None, 3, 4]], ids=str)
def test_missing_metrics_are_told_and_blank_lines_go(copied, recipe, finished, caplog, kept):
    (copied / SEAL_FILE).unlink()
    shutil.rmtree(copied / "checkpoint-4")
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[step - 1] if step else "\n" for step in kept))
    train(*recipe(copied))
    missing = len({1, 2, 3} - set(kept))
    assert (f"lacks {missing} of the 3 steps behind this run" in caplog.text) == (missing > 0)
    assert lasting(copied) == [record for record in lasting(finished) if record["step"] in (*kept, 4)]


# Other commands


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "resolved.yaml", "README.md", "config.json", "resolved.yaml.tmp"]
)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_file_in_the_place_of_one_is_named(copied, recipe, name, make):
    """A pipe would be waited on for ever."""
    (copied / name).unlink(missing_ok=True)
    make(copied / name)
    with pytest.raises(UserError, match=rf"{name} is no file, and one of that name is written there: move"):
        train(*recipe(copied, "--max_steps", "8"))


@pytest.mark.parametrize("name", ["checkpoint-8", "final.partial"])
def test_a_file_in_the_place_of_a_folder_is_named(copied, recipe, name):
    (copied / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} is no folder, and one of that name is written there"):
        train(*recipe(copied, "--max_steps", "8"))
    assert (copied / name).read_text() == "mine"


FOREIGN = [
    *("config.json", "checkpoint-3/model.safetensors", "adapter_config.json", "model-00001-of-2.safetensors"),
    *("pytorch_model.bin", "tokenizer.json", "README.md", "metrics.jsonl", "trainer_state.json", "seal.json"),
    *("report.json", "bridge.safetensors", "summary.json", "samples.jsonl", "settings.json"),
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_model_or_result_is_refused(tmp_path, recipe, content):
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("{}")
    before = files(tmp_path)
    name = content.partition("/")[0]
    with pytest.raises(UserError, match=rf"{name}, which is not of this command: choose another output_dir"):
        train(*recipe(tmp_path))
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", ["bridge.safetensors", "report.json"])
def test_a_folder_of_a_bridge_is_refused_although_it_has_settings(copied, recipe, content):
    (copied / content).write_text("{}")
    with pytest.raises(UserError, match=rf"holds {content}, which is not of this command"):
        train(*recipe(copied))


def test_a_run_in_use_is_refused_and_nothing_is_touched(copied, recipe):
    (copied / SEAL_FILE).unlink()
    shutil.rmtree(copied / "checkpoint-4")
    with multiprocessing.get_context("fork").Pool(1) as pool:
        other = pool.apply(Holder.this_process, ("oprd train", copied))
        (copied / LOCK_FILE).write_text(json.dumps(asdict(other)))
        before = files(copied)
        with pytest.raises(UserError, match=rf"is in use by oprd train \(process {other.pid} on .*, since "):
            train(*recipe(copied))
        assert files(copied) == before


def test_a_refused_command_leaves_what_another_one_has_made(tmp_path, recipe, finished, monkeypatch):
    """It starts while there is no folder; another run is finished there before it finds its own mistake."""
    folder = tmp_path / "run"

    def others_run(*args, **kwargs):
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        raise UserError("a mistake found late")

    monkeypatch.setattr("oprd.training.train.load_prompts", others_run)
    with pytest.raises(UserError, match="a mistake found late"):
        train(*recipe(folder))
    assert files(folder).keys() == {folder / path.relative_to(finished) for path in files(finished)}


def test_a_run_that_was_finished_before_this_one_took_the_folder_is_left_alone(
    tmp_path, recipe, finished, monkeypatch
):
    folder = tmp_path / "run"
    check = lock.check_writable
    monkeypatch.setattr(lock, "check_writable", lambda path: (shutil.copytree(finished, path), check(path)))
    monkeypatch.setattr("oprd.training.train._make_trainer", None)
    assert train(*recipe(folder)) == folder
