"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a path, a name, a number, a file.

    The message says what was given, what was expected and what to do. The command line prints it as one line and exits
    with status 2; any other exception is a defect of ours and keeps its traceback.
    """


def near_multiples(number: int, factor: int) -> str:
    """The positive multiples of `factor` next to a number that is none, for a message: "32 or 48", or only "16"."""
    lower, upper = number // factor * factor, (number // factor + 1) * factor
    return f"{lower} or {upper}" if lower > 0 else f"{max(upper, factor)}"
