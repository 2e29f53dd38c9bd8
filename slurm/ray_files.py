"""Ray's own files on a node: a folder that is this job's alone, and what went wrong as Ray's logs there say."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A path to a Unix socket has at most 107 bytes, of which Ray's own names take up to 75.
_LONGEST = 30
# The first words of a log's line, as "[2026-11-25 12:46:09,123 E 17 17] (raylet) main.cc:9: ".
_HEADER = re.compile(r"^\[[^\]]*\](?: \([^)]*\))? ?(?:\S+:\d+: )?")
_TROUBLE = re.compile(r"error|fail|exception|denied|no such|cannot|not found|exceed", re.IGNORECASE)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Makes a folder for Ray's sessions, which by default share /tmp/ray with those of all other users."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _LONGEST - len("/ray-12345678"):
        base = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def trouble(folder: Path) -> str:
    """Returns the last line in Ray's logs that speaks of an error, and in which file; "" if there is none."""
    logs = [file for pattern in ("*.err", "*.out", "*.log") for file in folder.rglob(pattern)]
    for file in sorted(logs, key=_rank, reverse=True):
        lines = [_HEADER.sub("", line).strip() for line in _end(file).splitlines()]
        bad = [line for line in lines if _TROUBLE.search(line)]
        if bad:
            return f"{bad[-1][:300]} ({file.name})"
    return ""


def _rank(file: Path) -> tuple[bool, bool, float]:
    """The start's own output first, then what was written to standard error, the newest first."""
    try:
        return file.name == "start.log", file.suffix == ".err", file.stat().st_mtime
    except OSError:
        return False, False, 0.0


def _end(file: Path) -> str:
    try:
        with open(file, "rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - 10_000))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
