"""The one exception that is meant for a person rather than for a traceback."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what is wrong and what to change.

    Raised before any compilation. The command line prints it without a traceback and exits with status 2.
    """
