"""Errors that end a command with one line and no traceback."""


class UserError(Exception):
    """A user's mistake; the text is one line that says what is wrong and what to do."""


class DamagedError(Exception):
    """A file that is missing or has changed; the text names it and says what is wrong."""


def is_text(value: str) -> bool:
    """Whether `value` is UTF-8 without NUL, so that it fits into any file and any path."""
    # Python decodes other bytes of command lines and file names as lone surrogates.
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
