"""Folders of runs: complete or absent, used by one run at a time, and resumed after a kill."""

import fcntl
import itertools
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tokenflow.errors import UserError
from tokenflow.runtime.ahead import in_parallel
from tokenflow.runtime.digests import digest_of


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which is renamed to `path` if the block succeeds.

    If the block raises, what it wrote is removed and `path` stays as it was.
    """
    partial = unfinished_path(path)
    with _created_folder(path.parent):
        remove(partial)
        try:
            yield partial
            _replace(partial, path)
        except BaseException:
            remove(partial)
            raise


@contextmanager
def resumable(path: Path, identity: str, resume: bool) -> Iterator[Path]:
    """As `staged` for a folder, which may already hold what a killed run of the same `identity` wrote.

    If the block raises UserError or FloatingPointError, the folder is removed. If anything else ends the
    block, the folder stays for the next run. Without `resume` the block starts with an empty folder.
    """
    partial = unfinished_path(path)
    note = partial / ".run.json"
    with _created_folder(path.parent):
        if not (resume and note.is_file() and note.read_bytes() == identity.encode()):
            remove(partial)
            partial.mkdir()
            note.write_bytes(identity.encode())
        try:
            yield partial
        except (UserError, FloatingPointError):
            remove(partial)
            raise
        _replace(partial, path)
        (path / note.name).unlink()


def unfinished_path(path: Path) -> Path:
    """Where a file or folder is written until it is complete and renamed to `path`."""
    return path.with_name(f".partial-{path.name}")


class Progress:
    """Which parts of a run's stages are done: one file for each, with the digest of what the part wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".progress"

    def is_done(self, stage: str, *part: int, written: Iterable[bytes]) -> bool:
        """Whether a part, or a stage without parts, is done and what it wrote is undamaged."""
        file = self._file(stage, part)
        try:
            return file.is_file() and file.read_bytes() == _digest(written)
        except (OSError, ValueError, EOFError):  # what was written is unreadable
            return False

    def done(self, stage: str, *part: int, written: Iterable[bytes]) -> None:
        """Record that a part is done, and the digest of what it wrote."""
        self.folder.mkdir(exist_ok=True)
        self._file(stage, part).write_bytes(_digest(written))

    def remove(self) -> None:
        """Forget all parts, when the run is done."""
        remove(self.folder)

    def _file(self, stage: str, part: Sequence[int]) -> Path:
        return self.folder / "_".join([stage, *map(str, part)])


def _digest(written: Iterable[bytes]) -> bytes:
    """The digest of the digests of what was written, which threads compute side by side."""
    each = in_parallel(lambda piece: digest_of([piece]).encode(), written)
    return digest_of(each).encode()


@contextmanager
def locked(folder: Path, waits: bool = False) -> Iterator[None]:
    """Keep other runs from `folder` during the block. If one is there, wait, or raise UserError with its pid.

    The system releases the lock of a process that dies.
    """
    path = folder.with_name(f".lock-{folder.name}")
    with _created_folder(path.parent), _lock(path, folder, waits) as file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path, folder: Path, waits: bool) -> IO:
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            with file:
                file.seek(0)
                raise UserError(
                    f"{folder}: process {file.read()} is at work there; let that process finish, or end it"
                ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the run that held the lock removed the file before we locked it


@contextmanager
def run_folder(parent: Path, name: str, config: str) -> Iterator[Path]:
    """The folder `parent/name` for the run with this `config` text, which it stores as `config.yaml`.

    The same text gets the same folder again; another text gets `name_2`, `name_3`, ...
    If the block raises UserError or FloatingPointError, a new folder is removed. If anything else ends the
    block, it stays for the next run.
    """
    with _created_folder(parent):
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


def _replace(partial: Path, path: Path) -> None:
    replaced = path.with_name(f".replaced-{path.name}")
    remove(replaced)  # of a run that was killed right here
    if path.is_dir():  # a folder cannot be renamed over one that has files
        path.rename(replaced)
    partial.replace(path)
    remove(replaced)


@contextmanager
def _created_folder(folder: Path) -> Iterator[None]:
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
            if existing.is_file() and existing.read_bytes() == config.encode():
                return folder, False
    finally:
        remove(claim)
