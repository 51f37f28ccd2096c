"""The one error a person is meant to read."""


class InputError(ValueError):
    """Something a person gave is wrong. The message says what, where, and what to do; it is shown without a traceback."""
