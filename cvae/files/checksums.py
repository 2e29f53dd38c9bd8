"""The sha256 of files and of JSON values."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BLOCK = 4 << 20


def sha256_of_file(path: Path, advance: Callable[[int], object] | None = None) -> str:
    """Returns the sha256 of a file. `advance` is called with the size of each block that was read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Returns the sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
