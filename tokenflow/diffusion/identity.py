"""What tells checkpoints apart: what is in their files, or the revision of the hub's repository.

Where a checkpoint lies, and how its path is spelt, is no part of it.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenflow.diffusion.parts import find_folder

SUFFIXES = (".json", ".txt", ".safetensors", ".bin")
BLOCKS, BLOCK_BYTES = 1024, 1 << 16  # of a file that is too large to be read whole


def identify(model_id: str, patterns: Sequence[str] = ("*",)) -> str:
    """What tells a checkpoint, a hub id or a folder in diffusers layout, from others.

    patterns: of the names of files that are read, of which configurations, vocabularies and weights count.
    """
    if not os.path.isdir(model_id):
        snapshot = find_folder(model_id)
        return snapshot.name if snapshot else model_id
    folder, files = Path(model_id), {}
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        is_unused = path.suffix == ".bin" and any(path.parent.glob("*.safetensors"))
        if path.suffix in SUFFIXES and path.is_file() and not is_unused:
            files[path.relative_to(folder).as_posix()] = path
    return digest_files(files)


def digest_files(files: Mapping[str, Path]) -> str:
    """A digest of files by name: of each its size, and blocks spread over the whole of it."""
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
