"""Digests: of the files that a run leaves, which reveal damage later, and of large ones that it is given."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tokenflow.errors import DamagedError

NAME = "digests.json"
BLOCKS, BLOCK_BYTES = 1024, 1 << 16  # of a file that is too large to be read whole


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


def digest_files(files: Mapping[str, Path]) -> str:
    """A digest of files by name, which may be large: of each its size, and blocks spread over all of it."""
    digest = hashlib.blake2b(digest_size=8)
    for name, path in files.items():
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= BLOCKS * BLOCK_BYTES:
                digest.update(file.read())
                continue
            for block in range(BLOCKS):  # the last one ends with the file
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write the digests of all files below `folder` (except hidden ones) to `folder/digests.json`."""
    below = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    names = [str(p) for p in below if str(p) != NAME and not any(s[0] == "." for s in p.parts)]
    files = {
        name: {"bytes": (folder / name).stat().st_size, "digest": digest}
        for name, digest in zip(names, _digest_all(folder, names), strict=True)
    }
    text = json.dumps({"files": files, "digest": _digest_list(files)}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def check(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Compare the files below `folder` whose relative path is `wanted` with their digests.

    Raises DamagedError for the first that is missing or has changed.
    """
    files = {name: file for name, file in _read_list(folder).items() if wanted(name)}
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing")
        if (size := path.stat().st_size) != file["bytes"]:
            raise DamagedError(f"{path} is damaged: it has {size} bytes, not {file['bytes']}")
    for name, digest in zip(files, _digest_all(folder, files), strict=True):
        if digest != files[name]["digest"]:
            raise DamagedError(f"{folder / name} is damaged: its content is not what was written")


def _digest_all(folder: Path, names: Iterable[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(file_digest, (folder / name for name in names)))


def _read_list(folder: Path) -> dict[str, dict]:
    """Size and digest of each file, after checking the digest of the list itself."""
    path = folder / NAME
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["digest"] == _digest_list(stored["files"]):
            kinds = {"bytes": int, "digest": str}
            for file in stored["files"].values():
                if {name: type(value) for name, value in file.items()} != kinds:
                    raise DamagedError(f"{path} is not as this version of the code writes it")
            return stored["files"]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise DamagedError(f"{path} is damaged: its content is not what was written")


def _digest_list(files: dict[str, dict]) -> str:
    return digest_of([json.dumps(files, sort_keys=True).encode()])
