"""The one exception a user is meant to read, and how it quotes others."""


class StepquantError(Exception):
    """Something the user gave cannot be used; the message is one sentence: given, expected, what to do.

    The command prints the message alone and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of another exception's message, without its full stop, to be quoted in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
