"""Errors that end a command with one line and no traceback."""

# How libraries say that memory ran out; cuBLAS and cuDNN need some of their own.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
)


class UserError(Exception):
    """A user's mistake; the text is one line that says what is wrong and what to do."""


class DamagedError(Exception):
    """A file that is missing or has changed; the text names it and says what is wrong."""


def is_text(value: str) -> bool:
    """Whether `value` is UTF-8 without NUL, so that it fits into any file and any path."""
    # Python decodes other bytes of command lines and file names as lone surrogates.
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def make_printable(text: str) -> str:
    """Escape line ends, what controls a terminal, and what else cannot be printed; paths may hold it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a library says that the memory of the device ran out."""
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def describe(error: Exception) -> str:
    """The first line of what an error of a library says, or its kind if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
