"""The checksums of files and of JSON values."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 4 << 20


def sha256_of_file(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Returns the sha256 of a file. `advance` is called with the size of each block that was read."""
    return _hash(hashlib.sha256(), path, advance)


def md5_of_file(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Returns the MD5 of a file, by which some publishers identify it; not safe against attacks."""
    return _hash(hashlib.md5(usedforsecurity=False), path, advance)


def _hash(digest: "hashlib._Hash", path: Path, advance: Callable[[int], object] | None) -> str:
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Returns the sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
