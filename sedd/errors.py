"""The exception for errors that the user can correct."""


class UserError(ValueError):
    """An invalid argument, file or environment: one line that says what is wrong and what to change.

    Raised before any compilation. The command line prints it without a traceback and exits with status 2.
    """
