"""The folders of runs: whole or absent, used by one run at a time, and resumed when that was killed."""

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
from tokenflow.runtime.digests import digest_of


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path to write a file or folder to, which becomes `path` when the block succeeds.

    When the block raises, nothing of it remains and what was at `path` before is untouched.
    """
    partial = partial_path(path)
    with _made_folder(path.parent):
        remove(partial)
        try:
            yield partial
            _replace(partial, path)
        except BaseException:
            remove(partial)
            raise


@contextmanager
def resumable(path: Path, identity: str, resume: bool) -> Iterator[Path]:
    """As `staged`, a folder; but the block finds what a killed run of the same `identity` left there.

    When the block raises UserError or FloatingPointError, nothing of the folder remains; whatever else
    ends the block, the folder stays for the next run. Without `resume` it is removed first.
    """
    partial = partial_path(path)
    note = partial / ".run.json"
    with _made_folder(path.parent):
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


def partial_path(path: Path) -> Path:
    """Where what will be at `path` is until it is whole."""
    return path.with_name(f".partial-{path.name}")


class Progress:
    """Which parts of a run's stages are done: a file for each, which holds the digest of what it wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".progress"

    def is_done(self, stage: str, *part: int, written: Iterable[bytes]) -> bool:
        """Whether that part, or a stage that has none, is done, and what it wrote is there unharmed."""
        file = self._file(stage, part)
        try:
            return file.is_file() and file.read_bytes() == digest_of(written).encode()
        except (OSError, ValueError, EOFError):  # what was written cannot be read any more
            return False

    def done(self, stage: str, *part: int, written: Iterable[bytes]) -> None:
        """Note that its files are written, and what with."""
        self.folder.mkdir(exist_ok=True)
        self._file(stage, part).write_bytes(digest_of(written).encode())

    def remove(self) -> None:
        """The run is done."""
        remove(self.folder)

    def _file(self, stage: str, part: Sequence[int]) -> Path:
        return self.folder / "_".join([stage, *map(str, part)])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """No other run works on `folder` in the block. Raises UserError, with its pid, where one does.

    The system takes the lock from a process that dies.
    """
    path = folder.with_name(f".lock-{folder.name}")
    with _made_folder(path.parent), _lock(path, folder) as file:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(path: Path, folder: Path) -> IO:
    while True:
        file = path.open("a+", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise UserError(
                    f"{folder}: process {file.read()} is at work on it; let it finish, or end it"
                ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # its run removed it between our opening and our locking it


@contextmanager
def run_folder(parent: Path, name: str, config: str) -> Iterator[Path]:
    """The folder `parent/name` for the run of this `config` text, which lies there as `config.yaml`.

    A run of the same text gets the same folder again; another one gets `name_2`, `name_3`, ...
    When a mistake of the user's or a wrong value ends the block, a folder that was not there before is
    removed; whatever else ends the block, it stays for the next run.
    """
    with _made_folder(parent):
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
    if path.is_dir():  # a folder cannot be renamed over one that has files
        replaced = path.with_name(f".replaced-{path.name}")
        remove(replaced)
        path.rename(replaced)
        partial.rename(path)
        remove(replaced)
    else:
        partial.replace(path)


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """`folder` exists in the block; when that raises, folders that are new and empty are removed."""
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
    """A folder for `config`, and whether it is new; runs side by side get different ones."""
    claim = parent / f".claim-{name}-{os.getpid()}"
    claim.mkdir()
    (claim / "config.yaml").write_bytes(config.encode())
    try:
        for number in itertools.count(1):
            folder = parent / (name if number == 1 else f"{name}_{number}")
            with suppress(OSError):  # renaming is atomic, and fails where a folder has files
                claim.rename(folder)
                return folder, True
            existing = folder / "config.yaml"
            if existing.is_file() and existing.read_bytes() == config.encode():
                return folder, False
    finally:
        remove(claim)
