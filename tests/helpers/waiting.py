"""Waiting for what other processes do."""

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object],
    seconds: float = 180,
    poll_s: float = 0.05,
    what: str = "the condition",
) -> None:
    """Returns once the condition holds. Fails after that many seconds, with what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(poll_s)
