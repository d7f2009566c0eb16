"""The exceptions for what the user can fix and what happens to a run, and which others are the machine's."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "bad_alloc",
    "CPUAllocator",
    "start new thread",
)
DEVICE_FAILED = ("CUDA error", "NCCL", "device-side assert")
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
LONGEST_REASON = 400


class UserError(ValueError):
    """What is wrong, where, and what to do, in one sentence; the command line prints it and exits with 2."""


class Fault(RuntimeError):
    """What went wrong in a run, in words that say all: the command line prints them and exits with 1."""


@contextmanager
def refusals_told() -> Iterator[None]:
    """Inside it, what a library refuses or finds missing is a `UserError`: the user can fix it."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


@contextmanager
def whatever_fails_is(sentence: Callable[[Exception], str]) -> Iterator[None]:
    """Inside it, every exception becomes a `UserError` with the words of `sentence`.

    A `UserError` stays as it is, and so does what is the machine's (`is_of_the_machine`).
    """
    try:
        with panics_are_errors():
            yield
    except UserError:
        raise
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise UserError(sentence(error)) from error


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Within it a panic of a library in Rust, which is no `Exception` to Python, is a `RuntimeError`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # every library has a class of its own
            raise
        raise RuntimeError(f"it panicked: {error}") from error


def reason(error: BaseException) -> str:
    """What an error says, on one line; the name of its class too where it says little without."""
    first, _, others = str(error).strip().partition("\n")
    if first.rstrip().endswith(":"):  # the list that follows is what it says
        first = f"{first} {others}"
    text = " ".join(first.split())
    if len(text) > LONGEST_REASON:
        text = f"{text[:LONGEST_REASON]} …"
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror
    says_enough = isinstance(error, OSError | ValueError | ImportError | RuntimeError) and text
    return text if says_enough else f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is the machine's: memory ran out, a device failed, a disk is full."""
    failed = any(words in str(error) for words in DEVICE_FAILED)
    return failed or is_out_of_memory(error) or is_of_the_disk(error)


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an error is that a disk, a quota or a limit on files is full, or a disk fails."""
    return isinstance(error, OSError) and error.errno in OF_THE_DISK


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it what a disk refuses is an `OSError` that names a file, `path` where libraries name none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:  # safetensors and torch have their own for a full disk
        number = next((n for n in OF_THE_DISK if os.strerror(n) in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is out of memory: every library words it differently."""
    if error is None:
        return False
    told = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
    return told or is_out_of_memory(error.__cause__ or error.__context__)


@contextmanager
def memory_may_run_out() -> Iterator[None]:
    """Inside it, out of memory ends the block and nothing else."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
