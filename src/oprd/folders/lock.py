"""One process at a time in an output folder: a lock that names its holder and survives no killed process.

The lock is the file `_lock`, which exactly one process can create, on shared file systems too. Its holder
touches it every `BEAT_SECONDS`. It is stale when its process has ended or, on a machine that cannot see the
process, when it was not touched for `SILENCE_SECONDS`. Whoever takes over a stale lock first creates
`_lock.<token>`, named by the token in it, which again only one process can do, and renames that to `_lock`.

filelock's `SoftFileLease` does the same on local disks. On NFS, where two names cannot be exchanged at once,
filelock 4.2 leaves a stale lock in place for ever.
"""

import json
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from oprd.folders.whole import check_writable
from oprd.foundation.errors import Fault, UserError

logger = logging.getLogger(__name__)

LOCK_FILE = "_lock"  # pushes to the Hub leave out what begins so
BEAT_SECONDS = 15.0
SILENCE_SECONDS = 120.0
POLL_SECONDS = 0.5
READ_ATTEMPTS = 10
TOKEN = re.compile(r"\w+")

_held: dict[Path, str] = {}  # the folders that this process holds, and the tokens of their locks


@dataclass(frozen=True)
class Holder:
    """A process as its lock describes it; `start` is empty where the system does not report it."""

    token: str
    command: str
    host: str
    pid: int
    start: str
    since: str
    folder: str

    @classmethod
    def this_process(cls, command: str, folder: Path) -> "Holder":
        """The holder that this process would be."""
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        start = _start_of(os.getpid()) or ""
        return cls(secrets.token_hex(8), command, _host(), os.getpid(), start, since, str(folder))

    @classmethod
    def of(cls, text: str) -> "Holder":
        """The holder that a lock's text describes; raises `ValueError`, `TypeError` or `RecursionError`."""
        holder = cls(**json.loads(text))
        texts = asdict(holder)
        pid = texts.pop("pid")
        if type(pid) is not int or not all(isinstance(text, str) for text in texts.values()):
            raise TypeError("a value is of another type")
        if not TOKEN.fullmatch(holder.token) or not 0 < pid < 2**31 or "\0" in holder.folder:
            raise ValueError("no process writes such a lock")
        return holder

    def __str__(self) -> str:
        return f"{self.command} (process {self.pid} on {self.host.split('/')[0]}, since {self.since})"


@contextmanager
def hold(
    folder: Path,
    command: str,
    is_first: bool = True,
    tell: Callable[[str | None], str | None] = lambda refusal: refusal,
) -> Iterator[None]:
    """Hold `folder` for the block, and make it if there is none; a block within a block changes nothing.

    Of several ranks only the first takes the lock; `tell` gives every rank what the first one gave it, so
    that all of them are refused together. Raises `UserError` naming the process that holds the folder.
    """
    place = folder.resolve()
    if place in _held:
        yield
        return
    made = [path for path in (place, *place.parents) if not path.exists()] if is_first else []
    me, refusal, done = Holder.this_process(command, place), None, threading.Event()
    if is_first:
        try:
            check_writable(folder)
            _acquire(place / LOCK_FILE, me)
            threading.Thread(target=_beat, args=(place / LOCK_FILE, me, done), daemon=True).start()
        except UserError as error:
            refusal = str(error)
    try:
        refusal = tell(refusal)
        if refusal is not None:
            raise UserError(refusal)
        _held[place] = me.token if is_first else ""
        yield
    finally:
        done.set()
        _held.pop(place, None)
        if os.getpid() == me.pid:  # not in a process that was forked off
            _release(place / LOCK_FILE, me, made)


def check_held(folder: Path) -> None:
    """Raise `Fault` if this process held `folder` and its lock was deleted or taken over."""
    token = _held.get(folder.resolve())
    if token:
        holder, _, _ = _holder(folder / LOCK_FILE)
        if holder is None or holder.token != token:
            taker = "its lock was deleted" if holder is None else f"{holder} took it over"
            raise Fault(f"{folder} is no longer held by this process ({taker}), which writes no more")


def _acquire(lock: Path, me: Holder) -> None:
    while True:
        with suppress(FileNotFoundError):  # another process removes the empty parents that it made
            lock.parent.mkdir(parents=True, exist_ok=True)
        holder, file, successor = _holder(lock)
        if holder is not None and _is_alive(holder, file):
            raise UserError(
                f"{lock.parent} is in use by {holder}: wait for it, stop it, or choose another output folder"
            )
        if not _create(successor, me):
            continue
        if _holder(lock)[0] == me:
            break
        successor.unlink(missing_ok=True)  # the stale lock was taken over, or released, since it was read
    if holder is not None:
        logger.warning("%s was left locked by %s, which has ended", lock.parent, holder)
        successor.replace(lock)
    for leftover in lock.parent.glob(f"{LOCK_FILE}.*"):
        leftover.unlink(missing_ok=True)


def _holder(lock: Path) -> tuple[Holder | None, Path, Path]:
    """Who holds a lock, the file that records it, and the file that the next holder has to create.

    That is the lock's creator, or who took it over from that one and has not renamed its file yet, and so on.
    """
    holder, file, successor = None, lock, lock
    while (following := _read(successor)) is not None:
        holder, file = following, successor
        successor = lock.with_name(f"{LOCK_FILE}.{holder.token}")
    return holder, file, successor


def _create(file: Path, holder: Holder) -> bool:
    """Make the file, unless it is there or its folder is not."""
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(holder)) + "\n")
    except (FileExistsError, FileNotFoundError):
        return False
    except OSError as error:
        file.unlink(missing_ok=True)
        raise UserError(f"{file} cannot be written ({error.strerror}): choose another folder") from error
    return True


def _read(file: Path) -> Holder | None:
    for _ in range(READ_ATTEMPTS):
        try:
            return Holder.of(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, RecursionError):
            time.sleep(POLL_SECONDS / READ_ATTEMPTS)  # another process may be writing it
    token = f"unreadable{file.name}"
    return Holder(token, "an unknown command", "an unknown host", 0, "", "an unknown time", os.devnull)


def _is_alive(holder: Holder, file: Path) -> bool:
    """Whether a holder still works here; where its process cannot be seen, waits for a touch of its lock."""
    original = Path(holder.folder) / LOCK_FILE
    with suppress(OSError):
        if not original.samefile(file) and _read(original) == holder:
            return False  # the folder was copied with its lock
    start = _start_of(holder.pid)
    if holder.host == _host() and (start is None or (start and holder.start)):
        return start == holder.start
    last = _last_beat(file)
    with tempfile.TemporaryFile(dir=file.parent) as probe:  # by the clock of the file system
        silent = os.fstat(probe.fileno()).st_mtime - last
    remaining = SILENCE_SECONDS - max(silent, 0.0)  # one from the future is of a clock that was set back
    if remaining > 0:
        logger.warning("%s is locked by %s: looking %.0f s for a sign of it", file.parent, holder, remaining)
    deadline = time.monotonic() + remaining
    while time.monotonic() < deadline and _last_beat(file) == last:
        time.sleep(POLL_SECONDS)
    return _last_beat(file) not in (0.0, last)


def _last_beat(file: Path) -> float:
    """When a lock was touched last, or 0 if there is none; opening it makes NFS ask its server."""
    try:
        with file.open("rb") as stream:
            return os.fstat(stream.fileno()).st_mtime
    except OSError:
        return 0.0


def _beat(lock: Path, me: Holder, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with suppress(OSError):
            if _read(lock) == me:
                os.utime(lock)


def _release(lock: Path, me: Holder, made: list[Path]) -> None:
    """Remove this process's lock, and the folders that it made if nothing has come into them."""
    with suppress(OSError):
        if _read(lock) == me:
            lock.unlink()
        for folder in made:
            folder.rmdir()


def _host() -> str:
    """Where process numbers mean the same: a machine, since its start, within one namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()}/{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str | None:
    """When a running process was started, empty where the system does not say; None if there is none."""
    try:
        os.kill(pid, 0)
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        )
    except ProcessLookupError:
        return None
    except OSError:
        return ""
    return None if state in "ZX" else fields[18]  # a zombie has ended
