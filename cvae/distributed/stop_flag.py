"""The flag that signals set. Imports no torch: a node that only serves Ray needs none."""

import signal
from typing import Any


class StopFlag:
    """Is set by SIGTERM (preemption, scancel) and SIGUSR2 (time limit); whoever owns it decides when to act."""

    def __init__(self) -> None:
        self.signal = ""
        """The name of the last signal that came; "" before the first."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._set)

    def __bool__(self) -> bool:
        return self.signal != ""

    def _set(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name
