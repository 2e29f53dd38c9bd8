"""How the commands write: aligned facts, tables, times, paths."""

import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from cvae.files.paths import printable
from slurm.cluster_file import count

__all__ = ["Fact", "aligned", "clock", "count", "duration", "printable", "shown", "table"]

Fact = tuple[str, str]


def aligned(facts: Iterable[Fact]) -> str:
    """One fact a line, the names in a column; a fact's further lines stand under its first."""
    rows = list(facts)
    width = max(len(name) for name, _ in rows)
    indent = "\n" + " " * (width + 2)
    return "\n".join(f"{name:<{width}}  {indent.join(text.splitlines())}" for name, text in rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Columns as wide as their widest cell; those whose header is in `right` flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    flushed = [name in right for name in header]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, flushed, strict=True)
        ).rstrip()
        for line in lines
    )


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
    """ "23 Nov 04:39:24", local time; "?" for what is no time."""
    try:
        return time.strftime("%d %b %H:%M:%S", time.localtime(when))
    except (ValueError, OverflowError, OSError):
        return "?"


def shown(path: Path) -> str:
    """Relative where that is shorter."""
    relative = os.path.relpath(path)
    return printable(relative if not relative.startswith("..") else str(path))
