"""The one exception for mistakes that the user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager


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
