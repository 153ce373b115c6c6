"""Errors that end a command with one line and no traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# How libraries say that memory ran out; cuBLAS and cuDNN need some of their own.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_NOT_SUPPORTED",
)
# How the system says that it has no more memory, threads, open files or room for one file.
_OUT_OF_RESOURCES = (
    "Cannot allocate memory",
    "Insufficient memory",  # OpenCV
    "can't start new thread",
    "Resource temporarily unavailable",
    "Too many open files",
    "File too large",
)
_RESOURCES = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EFBIG)
MOST_LETTERS = 300  # of what a library says


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says that the memory of the device ran out."""
    return any(words in str(error) for words in _OUT_OF_MEMORY)


def is_out_of_resources(error: BaseException | None) -> bool:
    """Whether memory, threads, open files or room for a file ran out, which is the fault of no input.

    To be asked before an error is blamed on a file. Libraries wrap errors, so the causes count too.
    """
    while error is not None:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            return True
        if isinstance(error, OSError) and error.errno in _RESOURCES:
            return True
        if any(words in str(error) for words in _OUT_OF_RESOURCES):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def blame(
    what: str,
    kinds: type[Exception] | tuple[type[Exception], ...] = Exception,
    remedy: str = "",
) -> Iterator[None]:
    """Make a library's error in the block a UserError: what is to blame, what the error says, the remedy.

    kinds: of errors; by default all, since each library and format fails in its own way.
    """
    try:
        yield
    except kinds as error:
        if is_out_of_resources(error):
            raise
        raise UserError(f"{what}: {describe(error)}{remedy and f'; {remedy}'}") from error


def describe(error: Exception) -> str:
    """What an error of a library says, in one line, or its kind if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} ..."
