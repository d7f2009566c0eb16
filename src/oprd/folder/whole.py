"""Files and folders that are there whole or not at all, whenever the process is killed.

A file is written beside its place and renamed. A folder that others write, file by file, gets a seal in the
end, `seal.json`: the names and sizes of its files. Without it, or with a file that differs, it is not whole.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from oprd.errors import UserError

SEAL_FILE = "seal.json"


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that a killed process leaves the new file or what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def seal(folder: Path, files: Iterable[Path]) -> None:
    """Declare `folder` whole with these files of it, once they have reached the disk."""
    sizes = {}
    umask = os.umask(0)
    os.umask(umask)
    for path in sorted(files):
        path.chmod(0o666 & ~umask)  # safetensors lets nobody else read
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    write_whole(folder / SEAL_FILE, json.dumps({"files": sizes}, indent=1) + "\n")


def unseal(folder: Path) -> None:
    """Declare that `folder` is about to change."""
    (folder / SEAL_FILE).unlink(missing_ok=True)


def damage(folder: Path) -> str | None:
    """Why `folder` is not whole, in words; None if it is."""
    try:
        sizes = dict(json.loads((folder / SEAL_FILE).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"it has no {SEAL_FILE}, so it was not written to its end"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


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
