"""Faults other than a kill: full disks, signals, damaged checkpoints, folders that cannot be written."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from killing import CLI, assert_same_run, finish, flags, lasting, run, start
from oprd.folders.checkpoints import checkpoints, last_whole_checkpoint
from oprd.folders.claims import is_finished
from oprd.folders.whole import SEAL_FILE

pytestmark = pytest.mark.drill

TRAIN = ["train", "recipes/tiny/vanilla.yaml"]
FILE_LIMIT = 5_000_000  # bytes: the weights of the tiny student fit, the state of its optimiser does not
DISK = "25m"  # two checkpoints of 10 MB fit, three do not


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "whole"
    finish([*TRAIN, *flags(folder, data)], folder)
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of `DISK` bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def last_line(said):
    return said.strip().splitlines()[-1]


def test_a_full_disk_ends_the_run_in_one_line_and_it_resumes(data, small_disk, uninterrupted):
    folder = small_disk / "run"
    argv = [*TRAIN, *flags(folder, data)]
    code, said = run(CLI, argv)
    assert code == 1
    assert last_line(said).startswith(f"oprd: the run failed: {folder}/checkpoint-6 could not be written")
    assert "the same command resumes" in last_line(said)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-2"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    finish(argv, folder)
    assert_same_run(folder, uninterrupted, last_step=6)


def test_a_disk_full_for_the_final_model_leaves_the_run_to_be_finished(data, small_disk, uninterrupted):
    """The checkpoint of the last step is there, and another program has taken the rest of the disk."""
    folder = small_disk / "run"
    argv = [*TRAIN, *flags(folder, data)]
    shutil.copytree(uninterrupted, folder, ignore=shutil.ignore_patterns("checkpoint-[24]"))
    (folder / SEAL_FILE).unlink()
    (folder / "model.safetensors").unlink()
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 1_000_000))
    code, said = run(CLI, argv)
    assert code == 1 and f"{folder}/final.partial could not be written" in last_line(said)
    assert not is_finished(folder, 1)
    (small_disk / "other").unlink()
    finish(argv, folder)
    assert_same_run(folder, uninterrupted, last_step=6)


def test_a_file_too_large_ends_the_run_in_one_line_and_it_resumes(tmp_path, data, uninterrupted):
    folder = tmp_path / "run"
    argv = [*TRAIN, *flags(folder, data)]
    code, said = run(CLI, argv, largest_file=FILE_LIMIT)
    assert code == 1 and f"{folder}/checkpoint-2 could not be written" in last_line(said)
    assert checkpoints(folder) == []
    finish(argv, folder)
    assert_same_run(folder, uninterrupted, last_step=6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_told_to_stop_goes_on(tmp_path, data, uninterrupted, number):
    folder = tmp_path / "run"
    argv = [*TRAIN, *flags(folder, data)]
    process = start(CLI, argv)
    while process.poll() is None and not (folder / "checkpoint-2" / SEAL_FILE).exists():
        time.sleep(0.005)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    kept = checkpoints(folder)[0]
    assert f"stopped with {kept}: the same command goes on from step" in last_line(said)
    finish(argv, folder)
    assert_same_run(folder, uninterrupted, last_step=6)


def test_each_damaged_file_of_the_newest_checkpoint_makes_the_run_fall_back(tmp_path, data, uninterrupted):
    names = sorted(path.name for path in (uninterrupted / "checkpoint-6").iterdir())
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", SEAL_FILE} < set(
        names
    )
    folder = tmp_path / "run"
    argv = [*TRAIN, *flags(folder, data)]
    finish(argv, folder)
    for name in names:
        file = folder / "checkpoint-6" / name
        content = file.read_bytes()
        for length in (0, len(content) // 2, len(content) - 1):
            if name != SEAL_FILE or length < len(content) - 1:  # whose last byte is a line's end
                os.truncate(file, length)
                assert last_whole_checkpoint(folder) == folder / "checkpoint-4", (name, length)
                file.write_bytes(content)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
        os.truncate(folder / "checkpoint-6" / name, 1000)
        (folder / SEAL_FILE).unlink()
        said = finish(argv, folder)
        assert f"{folder}/checkpoint-6 is passed over: {name} has 1000 bytes, not " in said
        assert_same_run(folder, uninterrupted, last_step=6)


def test_an_output_folder_that_cannot_be_written_is_the_users_mistake(tmp_path, data):
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o555)
    if os.geteuid() == 0:  # whom permissions do not hold back
        parent = Path("/proc/self")
    for command in (TRAIN, ["bridge", "recipes/tiny/bridge.yaml"]):
        given = flags(parent / "run", data) if command == TRAIN else ["--output_dir", str(parent / "run")]
        code, said = run(CLI, [*command, *given])
        assert code == 2 and "Traceback" not in said
        assert last_line(said).startswith(f"oprd: {parent}/run cannot be written to ({parent}: ")
    assert not (parent / "run").exists()
    assert lasting(parent / "run") == []
