"""The exception and the warning that users are meant to read, and how a message quotes others."""


class StepquantError(Exception):
    """A user's input cannot be used.

    The message has the form ``<what was given> <is wrong how>; expected <what>. <What to do>.`` and is one line. The
    command prints it without a traceback and exits with code 2.
    """


class LowQualityWarning(UserWarning):
    """A quantized model is below the floor of its bits. The message has the form of `StepquantError`."""


def first_line(error: Exception) -> str:
    """Return the first line of another exception's message without its full stop, to be quoted in a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" .")
