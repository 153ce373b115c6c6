"""Digests of the files that a run leaves, so that a later run notices damage before it uses them."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenflow.errors import DamagedError

NAME = "digests.json"


def digest_of(parts: Iterable[bytes]) -> str:
    """The digest of bytes that come in parts."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's bytes. It releases the interpreter lock, so that threads run side by side."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def seal(folder: Path) -> None:
    """Write the digests of all files below `folder` (except hidden ones) to `folder/digests.json`."""
    below = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    names = [str(p) for p in below if str(p) != NAME and not any(s[0] == "." for s in p.parts)]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(file_digest, (folder / name for name in names))
        files = {
            name: {"bytes": (folder / name).stat().st_size, "digest": digest}
            for name, digest in zip(names, digests, strict=True)
        }
    text = json.dumps({"files": files, "digest": _digest_of_list(files)}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def check(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Compare the files below `folder` whose relative path is `wanted` with their digests.

    Raises DamagedError for the first that is missing or has changed.
    """
    files = _sealed(folder)
    names = [name for name in files if wanted(name)]
    with ThreadPoolExecutor() as pool:
        for problem in pool.map(lambda name: _problem(folder / name, files[name]), names):
            if problem:
                raise DamagedError(problem)


def _problem(path: Path, sealed: dict) -> str:
    """What is wrong with a file; empty if nothing is."""
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != sealed["bytes"]:
        return f"{path} is damaged: it has {size} bytes, not {sealed['bytes']}"
    if file_digest(path) != sealed["digest"]:
        return f"{path} is damaged: its content is not what was written"
    return ""


def _sealed(folder: Path) -> dict[str, dict]:
    """Size and digest of each file, after checking the digest of the list itself."""
    path = folder / NAME
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["digest"] == _digest_of_list(stored["files"]):
            return stored["files"]
    except (ValueError, KeyError, TypeError):
        pass
    raise DamagedError(f"{path} is damaged: its content is not what was written")


def _digest_of_list(files: dict[str, dict]) -> str:
    return digest_of([json.dumps(files, sort_keys=True).encode()])
