"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a name, a number, a file.

    The message says what was given, what was expected and what to do. The command line prints it as one line and exits
    with status 2; any other exception is a defect of ours and keeps its traceback.
    """
