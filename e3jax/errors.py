"""The exceptions that mean something to the user: the command line prints them, no traceback."""


class UserError(ValueError):
    """Bad input. The message names the file, key or value, what was expected, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Diverged(RuntimeError):
    """A run of training steps whose gradients were not finite. The exit code is 1."""
