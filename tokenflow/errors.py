"""What can be wrong with what a command was given or finds: one line that names it, and no traceback."""


class UserError(Exception):
    """A mistake of the user's: its text is one line that says what is wrong and what to do."""


class DamagedError(Exception):
    """A file is not what a run wrote: its text names the file and says what is wrong with it."""
