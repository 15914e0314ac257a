"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave is wrong. The message is one sentence: what, where, and what would be right."""
