"""Folders of runs: complete or absent, used by one run at a time, and resumed after a kill."""

import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tokenflow.errors import UserError
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.digests import digest_of


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

    If the block raises UserError or FloatingPointError, the folder is removed. If anything else ends the
    block, the folder stays for the next run. Without `resume` the block starts with an empty folder.
    """
    unfinished = unfinished_path(path)
    note = unfinished / ".run.json"
    with _create_folder(path.parent):
        if not (resume and note.is_file() and note.read_bytes() == identity.encode()):
            remove(unfinished)
            unfinished.mkdir()
            note.write_bytes(identity.encode())
        try:
            yield unfinished
        except (UserError, FloatingPointError):
            remove(unfinished)
            raise
        _replace(unfinished, path)
        (path / note.name).unlink()


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
    """Keep other runs from `folder` during the block. If one is there, wait, or raise UserError with its pid.

    The system releases the lock of a process that dies.
    """
    path = folder.with_name(f".lock-{folder.name}")
    with _create_folder(path.parent):
        try:
            acquired = FileLock(path).acquire(timeout=-1 if waits else 0)
        except Timeout:
            holder = path.read_text(errors="replace") if path.exists() else "that has just ended"
            raise UserError(
                f"{folder}: process {holder} is at work there; let that process finish, or end it"
            ) from None
        with acquired:
            path.write_text(f"{os.getpid()} on {socket.gethostname()}")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)


@contextmanager
def open_run_folder(parent: Path, name: str, config: str) -> Iterator[Path]:
    """The folder `parent/name` for the run with this `config` text, which it stores as `config.yaml`.

    A text with the same last line, which says what the run makes, gets the same folder again; another one
    gets `name_2`, `name_3`, ...
    If the block raises UserError or FloatingPointError, a new folder is removed. If anything else ends the
    block, it stays for the next run.
    """
    with _create_folder(parent):
        folder, new = _claim_folder(parent, name, config)
        try:
            yield folder
        except (UserError, FloatingPointError):
            if new:
                remove(folder)
            raise


def remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(unfinished: Path, path: Path) -> None:
    replaced = path.with_name(f".replaced-{path.name}")
    remove(replaced)  # of a run that was killed right here
    if path.is_dir():  # a folder cannot be renamed over one that has files
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


def _claim_folder(parent: Path, name: str, config: str) -> tuple[Path, bool]:
    """The folder of `config`, and whether it is new; it is claimed atomically, as runs may be concurrent."""
    claim = parent / f".claim-{name}-{os.getpid()}"
    claim.mkdir()
    (claim / "config.yaml").write_bytes(config.encode())
    try:
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}_{number}")
            with suppress(OSError):  # renaming is atomic, and fails if the target has files
                claim.rename(folder)
                return folder, True
            existing = folder / "config.yaml"
            if existing.is_file() and _last_line(existing.read_bytes()) == _last_line(
                config.encode()
            ):
                return folder, False
    finally:
        remove(claim)


def _last_line(text: bytes) -> bytes:
    return text.rstrip().rpartition(b"\n")[-1]
