"""The progress bar of everything that takes longer than a moment."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    total: int, unit: str, what: str, done: int = 0, disable: bool = False, delay: float = 0
) -> "tqdm[Any]":
    """A live bar on a terminal, a line every ten seconds elsewhere.

    done: before this start. delay: seconds after which it shows, for what is mostly quick.
    """
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        unit_scale=unit == "B",
        desc=what,
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
        disable=disable,
        delay=delay,
    )
