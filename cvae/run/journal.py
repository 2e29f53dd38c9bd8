"""The journal: an append-only file of JSON lines that records everything a run measures and does.

MLflow, tables and progress bars are views of it. One process writes (rank 0), any number read.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvae.run.journal_lines import BadLine, Line, decode

# A run that resumes from an earlier checkpoint computes these again; the first line is kept.
_ONCE_PER_STEP = frozenset({"step", "epoch", "system", "picture", "evaluation"})
_FSYNC_INTERVAL_S = 1.0
_POINTS = (b'"kind":"step"', b'"kind":"system"')

_log = logging.getLogger(__name__)
_warned: set[Path] = set()
_COMPARED = 200  # bytes: a line contains its time
_outlines: dict[tuple[Path, int], "_Outline"] = {}


class Journal:
    """Appends lines to the journal at `path`; opening it removes a last line that was cut short.

    `append` returns when the kernel has the line, so that killing the process, even with SIGKILL, loses
    none. An fsync about once a second, on `sync` and on `close` limits what a crash of the host can lose.
    Raises OSError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        lines, self._size = read(self.path)
        os.ftruncate(self._file, self._size)
        self._written = {_identity(line) for line in lines} - {None}
        self._synced_at = time.monotonic()
        self._lock = threading.Lock()  # the thread that writes checkpoints appends, too

    def append(self, kind: str, **fields: Any) -> bool:
        """Writes one line with the time (unix seconds). Returns whether it was written.

        A step, epoch, system, picture or evaluation line is not written if the journal has one of its
        step (and key) already. Values of `metrics` may be anything that float() takes, nan and infinities
        included; other fields must be plain JSON (else TypeError or ValueError). Raises OSError, for
        example on a full disk; the file then still ends with a whole line.
        """
        record = {"time": time.time(), "kind": kind, **fields}
        identity = _identity(record)
        if identity is not None and identity in self._written:
            return False
        if "metrics" in fields:
            record["metrics"] = {name: _encode(value) for name, value in fields["metrics"].items()}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._write(line)
        self._written.add(identity)
        if time.monotonic() - self._synced_at >= _FSYNC_INTERVAL_S:
            self.sync()
        return True

    def sync(self) -> None:
        """Returns when all lines are on the disk.

        Call it before a checkpoint becomes visible, so that a host that crashes never comes back with
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
            # Half a line would spoil the next one, should there be space again.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)


def read(path: Path, offset: int = 0) -> tuple[list[Line], int]:
    """Returns the whole lines from byte `offset` on, and the offset at which to read on.

    Metrics are floats, nan and infinities included. A file that does not exist yet has no lines. A line
    that decode() refuses is skipped; the log has a warning of the first one in a file. Raises OSError if
    the file cannot be read.
    """
    lines = []
    for line, end in read_each(path, offset):
        offset = end
        if line is not None:
            lines.append(line)
    return lines, offset


def read_each(path: Path, offset: int = 0) -> Iterator[tuple[Line | None, int]]:
    """Yields each line as read() would, or None for one that is skipped, with the offset behind it."""
    for encoded in _whole_lines(path, offset):
        line = _decode_or_warn(encoded, path, offset)
        offset += len(encoded) + 1
        yield line, offset


def read_outline(path: Path, offset: int = 0, until: int | None = None) -> list[Line]:
    """Returns the lines from byte `offset` to `until`, but of consecutive points only the last step and system.

    That is enough for a run's state, times and newest values, in a tenth of the time. If `until` is not
    given, a later call in the same process reads only new lines, unless the file was cut or replaced.
    Raises OSError if the file cannot be read.
    """
    if until is not None:
        return _read_on(path, _Outline([], offset), until).lines
    known = _outlines.get((path, offset))
    if known is None or not known.is_of(path):
        known = _Outline([], offset)
    _outlines[path, offset] = known = _read_on(path, known)
    return list(known.lines)


class _Outline(NamedTuple):
    lines: list[Line]
    end: int
    """The offset behind the last line that was read."""
    last: bytes = b""
    """The end of that line."""
    inode: int = 0

    def is_of(self, path: Path) -> bool:
        """Returns whether the file still begins with the lines that were read."""
        try:
            with open(path, "rb") as file:
                file.seek(self.end - len(self.last))
                same = file.read(len(self.last)) == self.last
                return same and self.inode in (0, os.fstat(file.fileno()).st_ino)
        except FileNotFoundError:
            return False


def _read_on(path: Path, known: _Outline, until: int | None = None) -> _Outline:
    lines = list(known.lines)
    offset, encoded = known.end, b""
    series: dict[bytes, list[tuple[bytes, int]]] = {mark: [] for mark in _POINTS}

    def end_series() -> None:
        newest = [next(_decoded(reversed(points), path), None) for points in series.values()]
        last = {line["kind"]: line for line in newest if line is not None}
        # The series may continue one that was read before, whose points are older.
        while lines and lines[-1]["kind"] in ("step", "system"):
            line = lines.pop()
            last.setdefault(line["kind"], line)
        lines.extend(sorted(last.values(), key=lambda line: (line["time"], line["kind"])))
        for points in series.values():
            points.clear()

    for encoded in _whole_lines(path, offset, until):
        mark = next((mark for mark in _POINTS if mark in encoded), None)
        if mark is not None:
            series[mark].append((encoded, offset))
        else:
            end_series()
            lines += _decoded([(encoded, offset)], path)
        offset += len(encoded) + 1
    end_series()
    if offset == known.end:
        return known
    return _Outline(lines, offset, encoded[-_COMPARED:] + b"\n", os.stat(path).st_ino)


def training_seconds(lines: Iterable[Line]) -> float:
    """Returns how long a run was trained, by its lines or its outline, without queues and pauses.

    Training lasts from a `start` to its `end` or, if it was killed, to the last line that it wrote: not
    an evaluation, and nothing from the preflight of the next attempt on.
    """
    seconds, began, last = 0.0, 0.0, 0.0
    training = False
    for line in lines:
        kind = line["kind"]
        if kind == "start":
            seconds += max(0.0, last - began)
            began = last = line["time"]
            training = True
        elif kind == "preflight":
            training = False
        elif training and kind != "evaluation":
            last = line["time"]
            training = kind != "end"
    return seconds + max(0.0, last - began)


def _whole_lines(path: Path, offset: int, until: int | None = None) -> Sequence[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            block = file.read(-1 if until is None else max(0, until - offset))
    except FileNotFoundError:
        return ()
    return block[: block.rfind(b"\n") + 1].split(b"\n")[:-1]


def _decoded(lines: Iterable[tuple[bytes, int]], path: Path) -> Iterator[Line]:
    """Yields the valid ones of some lines, each given with its offset."""
    decoded = (_decode_or_warn(encoded, path, offset) for encoded, offset in lines)
    return (line for line in decoded if line is not None)


def _decode_or_warn(encoded: bytes, path: Path, offset: int) -> Line | None:
    try:
        return decode(encoded)
    except BadLine as error:
        if path not in _warned:
            _warned.add(path)
            with open(path, "rb") as file:
                number = file.read(offset).count(b"\n") + 1
            _log.warning("%s: line %d is skipped: %s", path, number, error)
        return None


def _identity(record: Line) -> tuple[Any, ...] | None:
    if record["kind"] in _ONCE_PER_STEP:
        return record["kind"], record.get("key"), record.get("step")
    return None


def _encode(value: Any) -> float | str:
    # JSON has no nan or infinity; in metrics a string can only mean one of these.
    number = float(value)
    return number if math.isfinite(number) else str(number)
