"""The progress bar of everything that may take longer than a moment."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(
    total: int, unit: str, what: str, done: int = 0, disable: bool = False, delay: float = 0
) -> "tqdm[Any]":
    """Returns a bar that is live on a terminal, and elsewhere prints a line every ten seconds.

    done: units that an earlier start completed. delay: seconds before the bar appears.
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
