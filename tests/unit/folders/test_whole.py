"""Files and folders that are there whole or not at all."""

import errno
import json
import os
from pathlib import Path

import pytest
import xxhash

from oprd.folders.whole import SEAL_FILE, check_place, check_writable, damage, seal, unseal, write_whole
from oprd.foundation.errors import UserError

SIZES = {"empty": 0, "model.safetensors": 9, "shards/0.distcp": 9}


@pytest.fixture
def sealed(tmp_path):
    """A sealed folder with a file, an empty file, and a file in a folder."""
    for name in ("model.safetensors", "empty", "shards/0.distcp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty" else "x" * 9)
    seal(tmp_path, [path for path in tmp_path.rglob("*") if path.is_file()])
    return tmp_path


def test_a_sealed_folder_is_whole(sealed):
    assert damage(sealed) is None
    sums = {name: xxhash.xxh3_128(b"" if name == "empty" else b"x" * 9).hexdigest() for name in SIZES}
    assert json.loads((sealed / SEAL_FILE).read_text()) == {"files": SIZES, "xxh3_128": sums}
    (sealed / "log.txt").write_text("what came later is nobody's business")
    assert damage(sealed) is None


@pytest.mark.parametrize("name", ["model.safetensors", "empty", "shards/0.distcp"])
def test_a_file_that_is_missing_or_of_another_size_is_named(sealed, name):
    size = (sealed / name).stat().st_size
    for content in ("", "x" * 8, "x" * 10):
        (sealed / name).write_text(content)
        if len(content) != size:
            assert damage(sealed) == f"{name} has {len(content)} bytes, not {size}"
    (sealed / name).unlink()
    assert damage(sealed) == f"{name} is missing"


@pytest.mark.parametrize("name", ["model.safetensors", "shards/0.distcp"])
@pytest.mark.parametrize("content", [b"xxxxxxxxy", b"yxxxxxxxx", bytes(9)], ids=["last", "first", "zeroed"])
def test_a_file_that_was_changed_and_kept_its_size_is_named(sealed, name, content):
    (sealed / name).write_bytes(content)
    assert damage(sealed) == f"{name} was changed after it was written (another checksum)"
    assert damage(sealed, by_size=True) is None
    (sealed / name).write_bytes(b"x" * 9)
    assert damage(sealed) is None


def test_a_seal_of_an_older_oprd_knows_sizes(sealed):
    (sealed / SEAL_FILE).write_text(json.dumps({"files": SIZES}))
    (sealed / "model.safetensors").write_bytes(bytes(9))
    assert damage(sealed) is None
    (sealed / "empty").write_bytes(b"x")
    assert damage(sealed) == "empty has 1 bytes, not 0"


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"files": 3}', '{"files": {}, "xxh3_128": 3}', "[" * 10**5]
)
def test_something_else_in_its_place_is_no_seal(sealed, text):
    (sealed / SEAL_FILE).write_text(text)
    assert "was not written to its end" in damage(sealed)


def test_a_file_that_the_disk_does_not_give_is_named(sealed, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (sealed / SEAL_FILE).write_text(json.dumps({"files": {"n" * 300: 1}}))
    assert damage(sealed) == "n" * 300 + " cannot be read (File name too long)"
    seal(sealed, [sealed / "model.safetensors"])
    monkeypatch.setattr("oprd.folders.whole._checksum", fail)
    assert damage(sealed) == "model.safetensors cannot be read (Input/output error)"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_sealed_files_may_be_read_by_whom_the_umask_lets(sealed, umask, mode):
    (sealed / "model.safetensors").chmod(0o600)  # as safetensors writes it
    before = os.umask(umask)
    try:
        (sealed / SEAL_FILE).unlink()
        seal(sealed, [path for path in sealed.rglob("*") if path.is_file()])
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    files = [path for path in sealed.rglob("*") if path.is_file()]
    assert len(files) == 4 and {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_a_seal_that_is_cut_anywhere_is_none(sealed):
    text = (sealed / SEAL_FILE).read_text()
    for length in range(len(text) - 1):
        (sealed / SEAL_FILE).write_text(text[:length])
        assert "was not written to its end" in damage(sealed), length
    unseal(sealed)
    unseal(sealed)
    assert "was not written to its end" in damage(sealed)


def test_write_whole_replaces(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for text in ("first", "second ×"):
        write_whole(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    check_writable(tmp_path / "runs" / "one")
    check_writable(tmp_path)
    check_writable(Path("."))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_name_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    mistakes = {"x" * 300: "File name", "loop": "Symlink", "a\0b": ".*null", "file": "Not a dir"}
    for name, why in mistakes.items():
        with pytest.raises(UserError, match=rf"cannot be an output folder \({why}.*choose another one"):
            check_place(tmp_path / name)
    for name in ("new", "dangling", "."):
        check_place(tmp_path / name)


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"file: Not a directory\): choose another output folder"):
            check_writable(folder)
