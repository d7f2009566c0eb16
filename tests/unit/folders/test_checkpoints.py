"""Which checkpoint is resumed from, how one is written, and which go."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from oprd.folders import whole
from oprd.folders.checkpoints import checkpoints, last_whole_checkpoint, publish, rotate, written_whole
from oprd.folders.lock import LOCK_FILE, hold
from oprd.folders.run_folder import STATE_FILE
from oprd.folders.whole import SEAL_FILE, damage, seal


def write(folder, *names, sealed=True):
    """A folder with files of these names, each holding its name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    if sealed:
        seal(folder, [folder / name for name in names])
    return folder


def checkpoint(run, step, sealed=True):
    """A checkpoint of a run: a model, random state, and the file that tells its step."""
    files = "model", "rng_state.pth", STATE_FILE
    folder = write(run / f"checkpoint-{step}", *files, sealed=False)
    (folder / STATE_FILE).write_text(f'{{"global_step": {step}}}')
    if sealed:
        seal(folder, [folder / name for name in files])
    return folder


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def alone():
    """The barrier of a single process."""


def test_the_newest_whole_one_is_chosen_by_number(tmp_path, caplog):
    for step in (9, 100, 10, 2):
        checkpoint(tmp_path, step)
    write(tmp_path / "checkpoint-best", "model")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (100, 10, 9, 2)]
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert not caplog.records
    (tmp_path / "checkpoint-100" / SEAL_FILE).unlink()
    (tmp_path / "checkpoint-10" / "model").write_text("")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert caplog.messages[0].startswith(f"{tmp_path}/checkpoint-100 is passed over: it has no seal.json")
    assert caplog.messages[1] == f"{tmp_path}/checkpoint-10 is passed over: model has 0 bytes, not 5"
    (tmp_path / "checkpoint-9" / "model").write_text("MODEL")
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    why = "model was changed after it was written (another checksum)"
    assert caplog.messages[-1] == f"{tmp_path}/checkpoint-9 is passed over: {why}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ("\x00" * 9, "cannot be read"),
        ("[" * 10**5, "cannot be read"),
        ('{"global_step": 2}', "is of step 2"),
        ('{"global_step": "3"}', "cannot be read"),
        ('{"global_step": 3, "max_steps": "9"}', "cannot be read"),
        ('{"global_step": 3, "epoch": "x"}', "cannot be read"),
        ('{"global_step": 3, "epoch": NaN}', "cannot be read"),
        ('{"global_step": 3, "stateful_callbacks": [1]}', "cannot be read"),
        ('{"global_step": 3, "a_key_of_no_version": 1}', "cannot be read"),
    ],
    ids=range(12),
)
def test_a_state_that_tells_no_step_is_passed_over_under_a_seal_of_sizes(tmp_path, caplog, content, why):
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 3, sealed=False)
    (newest / STATE_FILE).write_text(content)
    seal(newest, [newest / STATE_FILE])
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert caplog.messages == [f"{newest} is passed over: {STATE_FILE} {why}"]


def test_without_a_whole_one_the_run_starts_over(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path / "none") is None and not caplog.records
    write(tmp_path / "checkpoint-3", "model", sealed=False)
    assert last_whole_checkpoint(tmp_path) is None
    assert caplog.messages[-1] == f"{tmp_path} holds no whole checkpoint: the run starts over"


def test_what_lay_there_goes_first_and_the_seal_comes_last(tmp_path):
    folder = write(tmp_path / "checkpoint-3", "model", "rng_state_7.pth")
    waits = []
    with written_whole(folder, is_writer=True, wait=lambda: waits.append(names(tmp_path))):
        assert not folder.exists()
        write(folder, "model", "shards/0", sealed=False)
    assert waits == [[], ["checkpoint-3/model", "checkpoint-3/shards/0"]]
    assert damage(folder) is None and names(folder) == ["model", SEAL_FILE, "shards/0"]


def test_a_rank_that_does_not_write_leaves_the_folder_to_the_one_that_does(tmp_path):
    folder = write(tmp_path / "checkpoint-3", "model", sealed=False)
    with written_whole(folder, is_writer=False, wait=alone):
        pass
    assert names(folder) == ["model"]


def no_room():
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


FULL = Path("/dev/full")
WRITERS = {
    "large tensor": lambda: torch.save(torch.zeros(1_000_000), FULL),
    "small tensor": lambda: torch.save(torch.zeros(1), FULL),
    "tensor in a file": lambda: torch.save(torch.zeros(1_000_000), FULL.open("wb")),
    "text": lambda: FULL.write_text("state"),
    "safetensors": no_room,  # which would rename a file to the device's place
}


@pytest.mark.skipif(not FULL.is_char_device(), reason="no device that is always full")
@pytest.mark.parametrize("write_to_a_full_disk", WRITERS.values(), ids=WRITERS)
def test_a_fault_of_the_disk_names_the_folder_and_frees_its_disk(tmp_path, write_to_a_full_disk):
    folder = tmp_path / "checkpoint-3"
    with (
        pytest.raises(RuntimeError, match=r"checkpoint-3 could not be written, with \d+ MB free .*resumes"),
        written_whole(folder, is_writer=True, wait=alone),
    ):
        write(folder, "model", sealed=False)
        write_to_a_full_disk()
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        RuntimeError("CUDA error: out of memory"),
        ConnectionResetError(104, "Connection reset by peer"),
        OSError("HTTPSConnectionPool(host='huggingface.co'): Max retries exceeded"),
        ValueError("nothing of the disk"),
    ],
    ids=str,
)
def test_other_errors_pass_unchanged_and_nothing_is_sealed(tmp_path, error):
    folder = tmp_path / "checkpoint-3"
    with pytest.raises(type(error)) as caught, written_whole(folder, is_writer=True, wait=alone):
        write(folder, "model", sealed=False)
        raise error
    assert caught.value is error
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, [1, 2, 3, 4, 5, 6]),
        (0, None, [1, 2, 3, 4, 5, 6]),
        (1, None, [5]),
        (2, None, [3, 5]),
        (1, 2, [2, 5]),
        (9, None, [1, 2, 3, 5]),
    ],
)
def test_rotation_keeps_the_newest_whole_ones(tmp_path, keep, best, left):
    """Checkpoints 4 and 6 were begun by a process that was killed."""
    for step in range(1, 7):
        checkpoint(tmp_path, step, sealed=step not in (4, 6))
    rotate(tmp_path, keep, best and str(tmp_path / f"checkpoint-{best}"))
    assert [path.name for path in reversed(checkpoints(tmp_path))] == [f"checkpoint-{n}" for n in left]


def test_rotation_reads_no_file(tmp_path, monkeypatch):
    """Each save would read all checkpoints again."""
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    monkeypatch.setattr(whole, "_checksum", None)
    rotate(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]


def test_a_process_whose_folder_was_taken_over_writes_no_checkpoint(tmp_path):
    folder = checkpoint(tmp_path, 3)
    with (
        hold(tmp_path, "oprd train"),
        pytest.raises(RuntimeError, match=r"no longer held by this process \(its lock was deleted\)"),
    ):
        (tmp_path / LOCK_FILE).unlink()
        with written_whole(folder, is_writer=True, wait=alone):
            pass
    assert damage(folder) is None


def test_publishing_seals_what_it_moved_and_nothing_else(tmp_path):
    run = write(tmp_path / "run", "model", "log.txt")
    partial = write(run / "final.partial", "model", "adapter/model")
    publish(partial, run)
    shutil.rmtree(tmp_path / "run" / "adapter")
    assert damage(run) == "adapter/model is missing"
    write(run, "adapter/model", "log.txt", sealed=False)
    (run / "log.txt").write_text("grows on")
    assert damage(run) is None
    assert names(run) == ["adapter/model", "log.txt", "model", SEAL_FILE]


@pytest.fixture(autouse=True)
def _log_level(caplog):
    caplog.set_level(logging.WARNING, logger="oprd")
