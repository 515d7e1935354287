"""The one exception that means: the input is wrong, and the user can put it right."""


class UserError(ValueError):
    """Bad input. The message names the file, key or value, what was expected, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
