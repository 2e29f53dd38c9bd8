"""Formats what the commands print: aligned facts, tables, times and paths."""

import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cvae.files.paths import printable

Fact = tuple[str, str]


def aligned(facts: Iterable[Fact]) -> str:
    """Returns one fact per line, the texts in a column; a text's further lines are indented alike."""
    rows = list(facts)
    width = max(len(name) for name, _ in rows)
    indent = "\n" + " " * (width + 2)
    return "\n".join(f"{name:<{width}}  {indent.join(text.splitlines())}" for name, text in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Returns a table of text; columns whose header is in `right` are right-aligned."""
    columns = []
    for cells in zip(header, *rows, strict=True):
        width = max(map(len, cells))
        columns.append([f"{cell:{'>' if cells[0] in right else '<'}{width}}" for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def duration(seconds: float) -> str:
    """ "42 s", "3 min 20 s", "5 h 07 min", "3 days 4 h"."""
    whole = max(0, round(seconds)) if math.isfinite(seconds) else 0
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole // 60 % 60:02} min"
    return f"{whole // 86400} days {whole // 3600 % 24} h"


def clock(when: float) -> str:
    """ "23 Nov 04:39:24" in local time, or "?" for a number that is no valid time."""
    try:
        return time.strftime("%d %b %H:%M:%S", time.localtime(when))
    except (ValueError, OverflowError, OSError):
        return "?"


def shown(path: Path) -> str:
    """Returns the path relative to the working directory if it is below it, else as it is."""
    relative = os.path.relpath(path)
    return printable(relative if not relative.startswith("..") else str(path))
