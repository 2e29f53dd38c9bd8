"""The journal: an append-only file of JSON lines, the truth about a run.

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

# After a resume from an earlier checkpoint these are computed again; the first telling stays.
_ONCE_PER_STEP = frozenset({"step", "epoch", "system", "picture", "evaluation"})
_FSYNC_INTERVAL = 1.0  # seconds
_POINTS = (b'"kind":"step"', b'"kind":"system"')

_log = logging.getLogger(__name__)
# A file's first bad line is named; it is read again and again, as while a run is followed.
_warned: set[Path] = set()
_COMPARED = 200  # bytes: a line has its time in it
_outlines: dict[tuple[Path, int], "_Outline"] = {}


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


def read(path: Path, offset: int = 0) -> tuple[list[Line], int]:
    """Returns the whole lines from byte `offset` on, and the offset to read on from: cheap to poll.

    Metrics are floats again, also nan and infinities. A file that is not there yet has no lines. A line
    that decode() refuses is skipped; one warning in the log names the first of a file. Raises OSError if
    the file cannot be read.
    """
    records = []
    for record, end in read_each(path, offset):
        offset = end
        if record is not None:
            records.append(record)
    return records, offset


def read_each(path: Path, offset: int = 0) -> Iterator[tuple[Line | None, int]]:
    """Yields the same line by line with the offset behind each; None stands for a line that was skipped."""
    for line in _whole_lines(path, offset):
        record = _decode_or_warn(line, path, offset)
        offset += len(line) + 1
        yield record, offset


def read_outline(path: Path, offset: int = 0, until: int | None = None) -> list[Line]:
    """Returns the lines from byte `offset` to `until`, but of each series of points only its last step and system.

    That is enough for a run's state, its times and its newest values, in a tenth of the time. Asked again without
    `until`, a process reads only what is new, unless the file has been cut or replaced. Raises OSError if the
    file cannot be read.
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
    """The offset behind what has been read."""
    last: bytes = b""
    """The end of the last line that has been read."""
    inode: int = 0

    def is_of(self, path: Path) -> bool:
        """Returns whether the file still begins with what has been read. Raises OSError if it cannot be read."""
        try:
            with open(path, "rb") as file:
                file.seek(self.end - len(self.last))
                same = file.read(len(self.last)) == self.last
                return same and self.inode in (0, os.fstat(file.fileno()).st_ino)
        except FileNotFoundError:
            return False


def _read_on(path: Path, known: _Outline, until: int | None = None) -> _Outline:
    outline = list(known.lines)
    offset, last = known.end, b""
    series: dict[bytes, list[tuple[bytes, int]]] = {mark: [] for mark in _POINTS}

    def end_series() -> None:
        newest = [next(_decoded(reversed(points), path), None) for points in series.values()]
        points = {line["kind"]: line for line in filter(None, newest)}
        # These are newer than the points of the same series that were read before.
        while outline and outline[-1]["kind"] in ("step", "system"):
            points.setdefault(outline[-1]["kind"], outline[-1])
            outline.pop()
        outline.extend(sorted(points.values(), key=lambda line: (line["time"], line["kind"])))
        for lines in series.values():
            lines.clear()

    for line in _whole_lines(path, offset, until):
        point = next((mark for mark in _POINTS if mark in line), None)
        if point is not None:
            series[point].append((line, offset))
        else:
            end_series()
            outline += _decoded([(line, offset)], path)
        offset += len(line) + 1
        last = line
    end_series()
    if offset == known.end:
        return known
    return _Outline(outline, offset, last[-_COMPARED:] + b"\n", os.stat(path).st_ino)


def training_seconds(lines: Iterable[Line]) -> float:
    """Returns for how long a run has been trained, by its lines or its outline; queues and pauses do not count.

    A stretch of training lasts from a `start` to its `end`; if it was killed, to the last line that it wrote.
    What stands before the next `start` is none of it: the preflight of the next attempt, an evaluation.
    """
    seconds, began, heard = 0.0, 0.0, 0.0
    training = False
    for line in lines:
        kind = line["kind"]
        if kind == "start":
            seconds += max(0.0, heard - began)
            began = heard = line["time"]
            training = True
        elif kind == "preflight":
            training = False
        elif training and kind != "evaluation":
            heard = line["time"]
            training = kind != "end"
    return seconds + max(0.0, heard - began)


def _whole_lines(path: Path, offset: int, until: int | None = None) -> Sequence[bytes]:
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            block = file.read(-1 if until is None else max(0, until - offset))
    except FileNotFoundError:
        return ()
    return block[: block.rfind(b"\n") + 1].split(b"\n")[:-1]


def _decoded(lines: Iterable[tuple[bytes, int]], path: Path) -> Iterator[Line]:
    """Those of the lines, each with its place in the file, that are good."""
    records = (_decode_or_warn(line, path, offset) for line, offset in lines)
    return (record for record in records if record is not None)


def _decode_or_warn(line: bytes, path: Path, offset: int) -> Line | None:
    try:
        return decode(line)
    except BadLine as error:
        if path not in _warned:
            _warned.add(path)
            _log.warning("%s: line %d is skipped: %s", path, _line_number(path, offset), error)
        return None


def _line_number(path: Path, offset: int) -> int:
    try:
        with open(path, "rb") as file:
            return file.read(offset).count(b"\n") + 1
    except OSError:
        return 0


def _identity(record: dict[str, Any]) -> tuple[Any, ...] | None:
    if record["kind"] in _ONCE_PER_STEP:
        return record["kind"], record.get("key"), record.get("step")
    return None


def _encode(value: Any) -> float | str:
    # JSON has no nan or infinity; in metrics a string can only mean one of these.
    number = float(value)
    return number if math.isfinite(number) else str(number)
