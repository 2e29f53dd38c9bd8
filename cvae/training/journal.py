"""The journal: an append-only file of JSON lines, the truth about a run.

MLflow, tables and progress bars are views of it. One process writes (rank 0), any number read.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# After a resume from an earlier checkpoint these are computed again; the first telling stays.
_ONCE_PER_STEP = frozenset({"step", "epoch", "system", "picture", "evaluation"})
_FSYNC_INTERVAL = 1.0  # seconds

_log = logging.getLogger(__name__)


class Journal:
    """Appends to the journal at `path`; a last line that was cut short is removed at opening.

    A line is handed to the kernel before `append` returns, so that killing the process, also with
    SIGKILL, loses none. What a crash of the whole host can lose is bounded by an fsync: about once
    a second, on `sync` and on `close` (one per line would cost the training loop milliseconds).

    Raises OSError where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        records, whole_lines = read(self.path)
        os.ftruncate(self._file, whole_lines)
        self._size = whole_lines
        self._seen = {_identity(record) for record in records} - {None}
        self._synced_at = time.monotonic()
        self._lock = threading.Lock()  # the thread that writes checkpoints tells of them, too

    def append(self, kind: str, **fields: Any) -> bool:
        """Writes one line and adds "time" (unix seconds). Returns whether it was written.

        False: a step, epoch, system, picture or evaluation line (the last two: with this key) of this
        step is there already. Values of `metrics` may be anything that float() takes, also nan and
        infinities; other fields must be plain JSON values (TypeError or ValueError otherwise).

        Raises OSError, for example on a full disk; the file then still ends with a whole line.
        """
        record = {"time": time.time(), "kind": kind, **fields}
        identity = _identity(record)
        if identity is not None and identity in self._seen:
            return False
        if "metrics" in fields:
            record["metrics"] = {name: _encode(value) for name, value in fields["metrics"].items()}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._write(line)
        self._seen.add(identity)
        if time.monotonic() - self._synced_at >= _FSYNC_INTERVAL:
            self.sync()
        return True

    def sync(self) -> None:
        """Waits until all lines are on the disk.

        Call it before a checkpoint becomes visible: a host that crashes then never comes back with
        a checkpoint that is ahead of its journal.
        """
        os.fsync(self._file)
        self._synced_at = time.monotonic()

    def close(self) -> None:
        if self._file >= 0:
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)
                self._file = -1

    def _write(self, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            # Half a line would spoil the next one, should there be room again.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)


def read(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, and the offset to read on from: cheap to poll.

    Metrics are floats again, also nan and infinities. A file that is not there yet has no lines. A
    line that is no JSON object with a kind is skipped with a warning in the log.
    """
    records = []
    for record, end in read_each(path, offset):
        offset = end
        if record is not None:
            records.append(record)
    return records, offset


def read_each(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """As `read`, line by line with the offset behind each; None is a line that was skipped."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            block = file.read()
    except FileNotFoundError:
        return
    for line in block[: block.rfind(b"\n") + 1].split(b"\n")[:-1]:
        record = None
        try:
            record = _decode(line)
        except (ValueError, TypeError, KeyError, AttributeError):
            shown = line[:60].decode(errors="replace")
            _log.warning("%s: skipping the damaged line at byte %d: %r", path, offset, shown)
        offset += len(line) + 1
        yield record, offset


def _decode(line: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(line)
    record["kind"]
    for name, value in record.get("metrics", {}).items():
        if type(value) is not float:
            record["metrics"][name] = float(value)
    return record


def _identity(record: dict[str, Any]) -> tuple[Any, ...] | None:
    if record["kind"] in _ONCE_PER_STEP:
        return record["kind"], record.get("key"), record.get("step")
    return None


def _encode(value: Any) -> float | str:
    # JSON has no nan or infinity; in metrics a string can only mean one of these.
    number = float(value)
    return number if math.isfinite(number) else str(number)
