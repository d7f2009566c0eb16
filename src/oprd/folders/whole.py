"""Files and folders that are there whole or not at all, whenever the process is killed.

A file is written beside its place and renamed. A folder that others write, file by file, gets a seal in the
end, `seal.json`: names, sizes and checksums of its files. Without it, or with a file that differs, it is not
whole.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

from oprd.foundation.errors import UserError, writing

SEAL_FILE = "seal.json"
CHECKSUM = "xxh3_128"  # finds damage, not forgery, as fast as memory is read
MISSING = "is missing"


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that a killed process leaves the new file or what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def seal(folder: Path, files: Iterable[Path]) -> None:
    """Declare `folder` whole with these files of it, once they have reached the disk."""
    sizes, checksums = {}, {}
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(files):
        name = path.relative_to(folder).as_posix()
        path.chmod(0o666 & ~umask)  # safetensors lets nobody else read
        checksums[name] = _checksum(path)  # before it is flushed, while it is in memory for sure
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        sizes[name] = path.stat().st_size
    write_whole(folder / SEAL_FILE, json.dumps({"files": sizes, CHECKSUM: checksums}, indent=1) + "\n")


def unseal(folder: Path) -> None:
    """Declare that `folder` is about to change."""
    (folder / SEAL_FILE).unlink(missing_ok=True)


def damage(folder: Path, by_size: bool = False) -> str | None:
    """Why `folder` is not whole; None if it is. `by_size` compares sizes alone, and reads no file."""
    try:
        fault = next(faults(folder, by_size), None)
    except UnreadableSeal as error:
        return str(error)
    return fault and " ".join(fault)


class UnreadableSeal(ValueError):
    """There is no seal, or none that can be read."""


def faults(folder: Path, by_size: bool = False) -> Iterator[tuple[str, str]]:
    """Name of each sealed file that is missing or differs, and what is wrong; raises `UnreadableSeal`.

    Seals of oprd 0.1.0 hold no checksums.
    """
    try:
        record = json.loads((folder / SEAL_FILE).read_text(encoding="utf-8"))
        sizes, checksums = dict(record["files"]), dict(record.get(CHECKSUM, {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableSeal(f"it has no {SEAL_FILE}, so it was not written to its end") from error
    for name, size in sizes.items():
        try:
            fault = _fault(folder / name, size, None if by_size else checksums.get(name))
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            yield name, fault


def _fault(path: Path, size: int, checksum: str | None) -> str | None:
    """What is wrong with a sealed file; None for nothing."""
    if not path.is_file():
        return MISSING
    if path.stat().st_size != size:
        return f"has {path.stat().st_size} bytes, not {size}"
    if checksum is not None and _checksum(path) != checksum:
        return "was changed after it was written (another checksum)"
    return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def check_place(folder: Path) -> None:
    """Raise `UserError` for what cannot be a folder: too long a name, a loop of links, or a file."""
    try:
        str(folder).encode()
        if folder.resolve().exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        name = str(folder).encode(errors="backslashreplace").decode()
        raise UserError(f"{name} cannot be an output folder ({why}): choose another one") from error


def check_writable(folder: Path) -> None:
    """Raise `UserError` unless files can be made in `folder`, or where it would be made; leaves none."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({existing}: {error.strerror}): choose another output folder"
        ) from error
