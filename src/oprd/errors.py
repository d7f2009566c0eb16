"""The one exception for mistakes that the user can mend, and what others tell of memory."""

from collections.abc import Iterator
from contextlib import contextmanager

OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "allocate memory",
    "bad_alloc",
    "CPUAllocator",
    "start new thread",
)


class UserError(ValueError):
    """What is wrong, where, and what to do, in one sentence; the command line prints it and exits with 2."""


@contextmanager
def refusals_told() -> Iterator[None]:
    """Within it what a library refuses, or finds not installed, is the user's to mend: a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or the one it came of, is that memory ran out: every library says so its own way."""
    if error is None:
        return False
    told = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
    return told or is_out_of_memory(error.__cause__ or error.__context__)


@contextmanager
def memory_may_run_out() -> Iterator[None]:
    """Within it running out of memory ends the block, and nothing more."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
