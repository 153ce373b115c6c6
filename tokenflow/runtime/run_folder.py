"""Folders of runs: complete or absent, used by one run at a time, and resumed after a kill."""

import fcntl
import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tokenflow.errors import UserError
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.digests import digest_of

NOTE = ".run.json"  # which says in an unfinished folder which run it is of


def unfinished_path(path: Path) -> Path:
    """Where a file or folder is written until it is complete and renamed to `path`."""
    return path.with_name(f".partial-{path.name}")


@contextmanager
def stage(path: Path, is_main: bool = True) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which is renamed to `path` if the block succeeds.

    If the block raises, what it wrote is removed and `path` stays as it was.
    is_main: False in the processes that only write into what the main process of their run stages.
    """
    unfinished = unfinished_path(path)
    if not is_main:
        yield unfinished
        return
    with _create_folder(path.parent):
        remove(unfinished)
        try:
            yield unfinished
            _replace(unfinished, path)
        except BaseException:
            remove(unfinished)
            raise


@contextmanager
def resume_folder(path: Path, identity: str, resume: bool) -> Iterator[Path]:
    """As `stage` for a folder, which may already hold what a killed run of the same `identity` wrote.

    If the block raises UserError or FloatingPointError, a folder that is new is removed. What an earlier run
    wrote stays, whatever ends the block. Without `resume` the block starts with an empty folder.
    """
    unfinished, is_new = unfinished_path(path), not (resume and can_resume(path, identity))
    with _create_folder(path.parent):
        if is_new:
            remove(unfinished)
            unfinished.mkdir()
            (unfinished / NOTE).write_bytes(identity.encode())
        with _remove_after_mistake(unfinished, is_new):
            yield unfinished
        _replace(unfinished, path)
        (path / NOTE).unlink()


def can_resume(path: Path, identity: str) -> bool:
    """Whether a killed run of that `identity` left an unfinished folder."""
    note = unfinished_path(path) / NOTE
    return note.is_file() and note.read_bytes() == identity.encode()


class Progress:
    """Which parts of a run are done: one file for each, with the digest of what the part wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".progress"

    def is_done(self, part: str, written: Iterable[bytes]) -> bool:
        """Whether a part is done and what it wrote is undamaged."""
        file = self.folder / part
        try:
            return file.is_file() and file.read_bytes() == _digest(written)
        except (OSError, ValueError, EOFError):  # what was written is unreadable
            return False

    def record(self, part: str, written: Iterable[bytes]) -> None:
        """Record that a part is done, and the digest of what it wrote."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / part).write_bytes(_digest(written))


def _digest(written: Iterable[bytes]) -> bytes:
    """The digest of the digests of what was written, which threads compute side by side."""
    each = in_parallel(lambda piece: digest_of([piece]).encode(), written)
    return digest_of(each).encode()


@contextmanager
def lock(folder: Path, waits: bool = False) -> Iterator[None]:
    """Keep other runs from `folder` during the block, and readers that `share` it.

    If some are there, wait, or raise UserError. The system releases the lock of a process that dies.
    """
    path = _lock_file(folder)
    with _create_folder(path.parent), ExitStack() as held:
        try:
            held.enter_context(FileLock(path).acquire(timeout=-1 if waits else 0))
        except Timeout:
            raise _busy(folder) from None
        held.callback(path.unlink, missing_ok=True)
        if folder.is_dir():
            held.enter_context(_lock_itself(folder, fcntl.LOCK_EX))
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield


@contextmanager
def share(folder: Path) -> Iterator[None]:
    """Keep `folder` as it is during the block, in which others may read it too.

    Raises UserError if a run is about to replace it. The lock is on the folder itself and needs no file, so
    that it works where one cannot write, and the system releases the lock of a process that dies.
    """
    with _lock_itself(folder, fcntl.LOCK_SH):
        yield


@contextmanager
def _lock_itself(folder: Path, operation: int) -> Iterator[None]:
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _busy(folder) from None
        except OSError:  # the file system has no locks
            pass
        if not os.path.samestat(os.fstat(file), folder.stat()):  # replaced since it was opened
            raise _busy(folder)
        yield
    finally:
        os.close(file)


def _busy(folder: Path) -> UserError:
    holder = "another process, such as an edit that reads it,"
    with suppress(OSError):  # it has no file, or has just ended
        holder = _lock_file(folder).read_text(errors="replace") or holder
    return UserError(f"{folder}: {holder} is at work there; let that process finish, or end it")


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".lock-{folder.name}")


@contextmanager
def open_run_folder(parent: Path, name: str, config: str, is_main: bool = True) -> Iterator[Path]:
    """The folder `parent/name` for the run with this `config` text, which it stores as `config.yaml`.

    A text with the same last line, which says what the run makes, gets the same folder again; another one
    gets `name_2`, `name_3`, ... While the block lasts, no other run can work there. If the block raises
    UserError or FloatingPointError, a folder that is new is removed. If anything else ends the block, it
    stays for the next run.
    is_main: False in the other processes of a run, which open the folder after the main process has.
    """
    if not is_main:
        yield _find_folder(parent, name, config)[0]
        return
    with _create_folder(parent), ExitStack() as held:
        with lock(parent / f"{name}.claim", waits=True):  # one run at a time looks for its folder
            folder, is_new = _find_folder(parent, name, config)
            if is_new:
                with stage(folder) as unfinished:
                    unfinished.mkdir()
                    (unfinished / "config.yaml").write_bytes(config.encode())
            held.enter_context(lock(folder))
        held.enter_context(_remove_after_mistake(folder, is_new))
        yield folder


def _find_folder(parent: Path, name: str, config: str) -> tuple[Path, bool]:
    """The folder of a run, and whether it is new."""
    for number in itertools.count(1):
        folder = parent / (name if number == 1 else f"{name}_{number}")
        if not os.path.lexists(folder):
            return folder, True
        stored = folder / "config.yaml"
        if stored.is_file() and _last_line(stored.read_bytes()) == _last_line(config.encode()):
            return folder, False


@contextmanager
def _remove_after_mistake(folder: Path, is_new: bool) -> Iterator[None]:
    try:
        yield
    except (UserError, FloatingPointError):
        if is_new:
            remove(folder)
        raise


def remove(path: Path) -> None:
    """Delete a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(unfinished: Path, path: Path) -> None:
    replaced = path.with_name(f".replaced-{path.name}")
    remove(replaced)  # of a run that was killed right here
    if path.is_dir() or path.is_symlink():  # a folder cannot be renamed over either
        path.rename(replaced)
    unfinished.replace(path)
    remove(replaced)


@contextmanager
def _create_folder(folder: Path) -> Iterator[None]:
    """Create `folder` for the block; if the block raises, remove folders that are new and empty."""
    missing = [f for f in (folder, *folder.parents) if not f.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for new in missing:
            with suppress(OSError):  # not empty: another run uses it
                new.rmdir()
        raise


def _last_line(text: bytes) -> bytes:
    return text.rstrip(b"\n").rpartition(b"\n")[2]
