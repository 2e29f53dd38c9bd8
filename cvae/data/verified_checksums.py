"""Which files of stores were read whole and found to be what was prepared, so that this is done once.

A file is known by its path, size, inode and times of change; if one of them differs it is read again. What was
found lies in <home>/.verified, a file for each store, and is shared by all machines that see the same files.
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

# Some file systems count times in seconds: of a file younger than this a later change might not be seen.
_SETTLED_S = 2.5


class Verified:
    """What is known of the files of one store.

    It relies on the time of a file's change of status, which no program can set back, as it can the other times.
    """

    def __init__(self, store: Path) -> None:
        name = hashlib.sha256(os.fsencode(store.resolve())).hexdigest()[:24]
        self.file = paths.home() / ".verified" / f"{name}.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process at a time on all ranks and hosts, so that a file is read once; the others wait."""
        with ExitStack() as held:
            with suppress(OSError):  # a read-only home
                self.file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(file_lock(self.file.with_suffix(".lock"), math.inf))
            yield

    def unknown(self, files: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
        """Those of `files`, each with its sha256, that have not been found to be so, or have changed since."""
        known = self._read()
        return [(path, sha) for path, sha in files if known.get(str(path)) != _state(path, sha)]

    def check(
        self, files: Sequence[tuple[Path, str]], advance: Callable[[int], object] = lambda n: None
    ) -> Path | None:
        """Reads `files`, some at once; returns the first whose sha256 is another, and remembers the others."""
        began = time.time()
        before = [_state(path, sha) for path, sha in files]
        with ThreadPoolExecutor(max(1, min(4, len(os.sched_getaffinity(0))))) as pool:
            found = list(pool.map(lambda file: sha256_of_file(file[0], advance), files))
        good = {
            str(path): state
            for (path, sha), state, digest in zip(files, before, found, strict=True)
            if digest == sha
            and state == _state(path, sha)
            and began - path.stat().st_ctime > _SETTLED_S
        }
        if good:
            with suppress(OSError):  # a full or read-only home: it is read again next time
                self.file.parent.mkdir(parents=True, exist_ok=True)
                paths.write_atomically(self.file, json.dumps({**self._read(), **good}, indent=1))
        wrong = (file[0] for file, digest in zip(files, found, strict=True) if digest != file[1])
        return next(wrong, None)

    def _read(self) -> dict[str, object]:
        try:
            content = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}


def _state(path: Path, sha256: str) -> list[object]:
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return [sha256, status.st_size, status.st_ino, *times]
