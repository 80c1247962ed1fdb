"""The one exception a user is meant to read."""


class StepquantError(Exception):
    """Something the user gave cannot be used; the message is one sentence: given, expected, what to do.

    The command prints the message alone and exits with code 2.
    """
