"""What can be wrong with what a command was given or finds: one line that names it, and no traceback."""


class UserError(Exception):
    """A mistake of the user's: its text is one line that says what is wrong and what to do."""


class DamagedError(Exception):
    """A file is not what a run wrote: its text names the file and says what is wrong with it."""


def is_text(value: str) -> bool:
    """Whether it can be written to any file and be part of any path: UTF-8 without NUL."""
    # Other bytes of a command line and of file names arrive as halves of surrogate pairs.
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
