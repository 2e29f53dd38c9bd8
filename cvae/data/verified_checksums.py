"""Remembers which files of a store were found to be as prepared, so that each is hashed only once.

The record of a store is in <home>/.verified and is shared by all machines that see the same files. A file
is hashed again if its path, size, inode or times of change differ from the record.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cvae.files import paths
from cvae.files.checksums import sha256_of_file
from cvae.files.file_lock import file_lock

# Some file systems count times in whole seconds: a later change of a younger file might not be noticed.
_SETTLED_S = 2.5


class VerifiedFiles:
    """The verified files of one store.

    It relies on the time of a file's change of status, which no program can set back.
    """

    def __init__(self, store: Path) -> None:
        name = hashlib.sha256(os.fsencode(store.resolve())).hexdigest()[:24]
        self.file = paths.home() / ".verified" / f"{name}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lets one process of all ranks and hosts verify files, while the others wait."""
        with ExitStack() as stack:
            with suppress(OSError):  # a read-only home
                self.file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(self.file.with_suffix(".lock"), math.inf))
            yield

    def unverified(self, files: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
        """Returns those of `files`, each with its sha256, that must be read."""
        record = self._read()
        return [(path, sha) for path, sha in files if record.get(str(path)) != _state(path, sha)]

    def check(
        self, files: Sequence[tuple[Path, str]], advance: Callable[[int], object] | None = None
    ) -> Path | None:
        """Reads `files`; returns the first whose sha256 is wrong, or None, and records the others."""
        began = time.time()
        before = [_state(path, sha) for path, sha in files]
        with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0))))) as pool:
            digests = list(pool.map(lambda file: sha256_of_file(file[0], advance), files))
        verified = {
            str(path): state
            for (path, sha), state, digest in zip(files, before, digests, strict=True)
            if digest == sha
            and state == _state(path, sha)
            and began - path.stat().st_ctime > _SETTLED_S
        }
        if verified:
            with suppress(OSError):  # a full or read-only home: the files are read again next time
                self.file.parent.mkdir(parents=True, exist_ok=True)
                record = json.dumps({**self._read(), **verified}, indent=1)
                paths.write_atomically(self.file, record)
        wrong = (path for (path, sha), digest in zip(files, digests, strict=True) if digest != sha)
        return next(wrong, None)

    def _read(self) -> dict[str, object]:
        try:
            record = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}


def _state(path: Path, sha256: str) -> list[object]:
    status = path.stat()
    return [sha256, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
