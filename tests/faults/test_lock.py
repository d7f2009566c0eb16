"""One process at a time in an output folder: who holds it, who is refused, what a killed holder leaves."""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from oprd.folders import lock
from oprd.folders.lock import LOCK_FILE, Holder, check_held, hold
from oprd.foundation.errors import UserError

processes = multiprocessing.get_context("fork")  # torch is imported already, and takes seconds


@pytest.fixture
def holder(request):
    """`holder(folder)`: a process that holds the folder until it is killed; returns it once it does."""
    started = []

    def start(folder):
        ready = processes.Event()
        process = processes.Process(target=_hold_for_ever, args=(folder, ready), daemon=True)
        process.start()
        started.append(process)
        assert ready.wait(20)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def _hold_for_ever(folder, ready):
    with hold(folder, "oprd train"):
        ready.set()
        time.sleep(600)


def stranger(folder, **changes):
    """A holder on another machine."""
    return replace(Holder.this_process("oprd eval", folder.resolve()), host="node7/boot/1", **changes)


def write(path, holder):
    path.write_text(json.dumps(asdict(holder)) + "\n")


def test_the_lock_goes_with_the_block_and_with_it_the_folders_made_for_it(tmp_path):
    folder = tmp_path / "runs" / "one"
    with hold(folder, "oprd train"):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), hold(folder, "oprd train"):
        (folder / "metrics.jsonl").write_text("")
        raise KeyError
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_was_there_stays(tmp_path):
    with hold(tmp_path, "oprd train"):
        pass
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == []


def test_a_second_process_is_told_who_holds_it(tmp_path, holder):
    process = holder(tmp_path / "run")
    with pytest.raises(UserError) as caught, hold(tmp_path / "run", "oprd train"):
        pass
    told = str(caught.value)
    host = os.uname().nodename
    assert told.startswith(
        f"{tmp_path}/run is in use by oprd train (process {process.pid} on {host}, since 20"
    )
    assert told.endswith("wait for it, stop it, or choose another output folder")
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == process.pid


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_a_killed_holder_is_taken_over_at_once(tmp_path, holder, caplog, reaped):
    process = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    if reaped:
        process.join()
    else:
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    with hold(tmp_path, "oprd train"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"was left locked by oprd train (process {process.pid} on" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_process_with_the_number_of_a_killed_one_holds_nothing(tmp_path):
    """The number is this process's own, so it runs; the start is another one."""
    write(tmp_path / LOCK_FILE, replace(Holder.this_process("oprd train", tmp_path), start="1"))
    with hold(tmp_path, "oprd train"):
        check_held(tmp_path)


def test_a_block_within_a_block_is_the_same_process(tmp_path, holder):
    with hold(tmp_path, "oprd demo"):
        with hold(tmp_path / "." / "x" / "..", "oprd eval"):
            pass
        check_held(tmp_path)
    holder(tmp_path)


def _count_alone(folder, start, count, results):
    """Take the folder `count` times; tells how often it had it, and how often it was not alone there."""
    start.wait()
    had = met = 0
    while had < count:
        try:
            with hold(folder, "oprd train"):
                mine = folder / "inside"
                try:
                    mine.touch(exist_ok=False)
                except FileExistsError:
                    met += 1
                time.sleep(0.0005)
                mine.unlink(missing_ok=True)
                had += 1
        except UserError:
            time.sleep(0.0005)
    results.put((had, met))


def test_of_many_starters_only_one_is_inside_at_a_time(tmp_path):
    folder, start, results = tmp_path / "run", processes.Event(), processes.Queue()
    crowd = [processes.Process(target=_count_alone, args=(folder, start, 25, results)) for _ in range(6)]
    for process in crowd:
        process.start()
    start.set()
    found = [results.get(timeout=60) for _ in crowd]
    for process in crowd:
        process.join()
    assert found == [(25, 0)] * 6
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def _take(folder, start, results, over):
    start.wait()
    try:
        with hold(folder, "oprd train"):
            results.put("won")
            over.wait()
    except UserError:
        results.put("refused")


@pytest.mark.parametrize("killed_in_taking_over", [0, 1, 2])
def test_of_many_starters_one_takes_over_a_killed_holder(tmp_path, killed_in_taking_over):
    """So it is when those that took it over before were killed before the lock was theirs."""
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        dead = [replace(Holder.this_process("oprd train", folder), start="1") for _ in range(3)]
        write(folder / LOCK_FILE, dead[0])
        for before, after in list(itertools.pairwise(dead))[:killed_in_taking_over]:
            write(folder / f"{LOCK_FILE}.{before.token}", after)
        start, results, over = processes.Event(), processes.Queue(), processes.Event()
        crowd = [processes.Process(target=_take, args=(folder, start, results, over)) for _ in range(4)]
        for process in crowd:
            process.start()
        start.set()
        assert sorted(results.get(timeout=30) for _ in crowd) == ["refused"] * 3 + ["won"]
        over.set()
        for process in crowd:
            process.join()
        assert list(folder.iterdir()) == []


def test_a_holder_on_another_machine_is_waited_for_until_it_gives_a_sign(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    write(tmp_path / LOCK_FILE, stranger(tmp_path))
    beats = processes.Process(target=_touch_after, args=(tmp_path / LOCK_FILE, 0.3))
    beats.start()
    told = r"in use by oprd eval \(process \d+ on node7, since"
    with pytest.raises(UserError, match=told), hold(tmp_path, "oprd eval"):
        pass
    beats.join()
    assert "looking 120 s for a sign of it" in caplog.text


def _touch_after(path, seconds):
    time.sleep(seconds)
    os.utime(path)


def test_a_holder_on_another_machine_that_is_silent_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.5)
    write(tmp_path / LOCK_FILE, stranger(tmp_path))
    began = time.monotonic()
    with hold(tmp_path, "oprd eval"):
        assert 0.4 < time.monotonic() - began < 5


def test_one_that_was_silent_for_long_is_taken_over_at_once(tmp_path):
    write(tmp_path / LOCK_FILE, stranger(tmp_path))
    os.utime(tmp_path / LOCK_FILE, (0, time.time() - 130))
    began = time.monotonic()
    with hold(tmp_path, "oprd eval"):
        assert time.monotonic() - began < 5


def test_a_sign_from_the_future_is_waited_on_no_longer_than_another(tmp_path, monkeypatch):
    """As a clock leaves it that was wrong and is put right."""
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.3)
    write(tmp_path / LOCK_FILE, stranger(tmp_path))
    os.utime(tmp_path / LOCK_FILE, (0, time.time() + 86_400))
    began = time.monotonic()
    with hold(tmp_path, "oprd eval"):
        assert 0.2 < time.monotonic() - began < 5


def test_a_holder_gives_signs(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    with hold(tmp_path, "oprd train"):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / LOCK_FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 0


def test_a_copy_of_a_held_folder_is_free(tmp_path, holder):
    holder(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with hold(tmp_path / "copy", "oprd train"):
        check_held(tmp_path / "copy")
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_a_held_folder_that_was_renamed_is_held(tmp_path, holder):
    holder(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "renamed")
    with pytest.raises(UserError, match="in use by oprd train"), hold(tmp_path / "renamed", "oprd train"):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "renamed")
    with pytest.raises(UserError, match="in use by oprd train"), hold(tmp_path / "link", "oprd train"):
        pass


def like_a_lock(**changes):
    """The text of a lock with other values in it."""
    return json.dumps(asdict(Holder("a1", "oprd train", "node7", 7, "", "", "/")) | changes)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}", '{"pid": 1}\n', "\x00" * 40, "[" * 100_000),
        *(like_a_lock(pid=pid) for pid in ("7", 7.0, True, None, [], 0, -1, 2**70)),
        *(like_a_lock(token=token) for token in ("", "a/b", "..", "a\0", 7)),
        *(like_a_lock(folder=folder) for folder in ("a\0b", None, ["a"])),
    ],
)
def test_a_lock_that_nobody_can_read_holds_until_it_is_old(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.3)
    (tmp_path / LOCK_FILE).write_text(content)
    began = time.monotonic()
    with hold(tmp_path, "oprd train"):
        assert time.monotonic() - began > 0.2
    assert list(tmp_path.iterdir()) == []


def test_a_holder_whose_lock_was_taken_over_or_deleted_is_told(tmp_path):
    check_held(tmp_path)
    with hold(tmp_path, "oprd train"):
        write(tmp_path / LOCK_FILE, stranger(tmp_path))
        with pytest.raises(RuntimeError, match=r"no longer held .*\(oprd eval .* took it over\)"):
            check_held(tmp_path)
        (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(RuntimeError, match="its lock was deleted"):
            check_held(tmp_path)
        write(tmp_path / LOCK_FILE, stranger(tmp_path))
    assert (tmp_path / LOCK_FILE).exists()  # it is another one's


def test_all_ranks_are_refused_with_the_first(tmp_path, holder):
    told = []
    with hold(tmp_path / "new", "oprd train", is_first=False, tell=lambda refusal: told.append(refusal)):
        assert not (tmp_path / "new").exists()
        with hold(tmp_path / "new", "oprd eval", is_first=False, tell=lambda refusal: "not asked"):
            pass
    assert told == [None]
    later = hold(tmp_path, "oprd train", is_first=False, tell=lambda _: "what the first rank said")
    with pytest.raises(UserError, match="what the first rank said"), later:
        pass
    holder(tmp_path)
    first = hold(tmp_path, "oprd train", tell=lambda refusal: told.append(refusal) or refusal)
    with pytest.raises(UserError, match="in use by"), first:
        pass
    assert "in use by" in told[1]


def test_a_file_is_no_folder_to_hold(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"), hold(tmp_path / "file", "oprd train"):
        pass
