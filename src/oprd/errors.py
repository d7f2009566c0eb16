"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """What is wrong, where, and what to do, in one sentence; the command line prints it and exits with 2."""
