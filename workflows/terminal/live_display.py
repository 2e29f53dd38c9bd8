"""What moves on the screen while a run is followed: a live line on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from workflows.terminal.formatting import duration

_INTERVAL_S = 10.0


class Display:
    """Sayings scroll by; below them stands either a status ("queued …") or the bar of a running job."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._line: tqdm[Any] | None = None
        self._has_bar = False
        self._printed_at = 0.0
        self._status = ""
        self._began: tuple[float, int] | None = None

    def say(self, text: str) -> None:
        """A line, or several, that stay."""
        if self._line is not None:
            self._line.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def status(self, text: str, detail: str = "") -> None:
        """What is going on while there is no progress. detail: changes too often to be a line each time."""
        if not self._live:
            if text != self._status:
                print(text + detail, flush=True)
            self._status = text
            return
        if self._line is None or self._has_bar:
            self.clear()
            self._line = tqdm(total=0, bar_format="{desc}", file=sys.stdout, leave=False)
        self._line.set_description_str(text + detail)

    def progress(self, step: int, total: int | None, notes: dict[str, str]) -> None:
        """notes: what is shown beside the steps, as {"loss": "237.1"}."""
        now = time.monotonic()
        if self._began is None:
            self._began = (now, step)
        self._status = ""
        if self._live:
            if self._line is None or not self._has_bar:
                self.clear()
                self._line = tqdm(
                    total=total,
                    initial=step,
                    unit="step",
                    file=sys.stdout,
                    dynamic_ncols=True,
                    leave=False,
                )
                self._has_bar = True
            self._line.set_postfix(notes, refresh=False)
            self._line.update(step - self._line.n)
        elif now - self._printed_at >= _INTERVAL_S or step == total:
            self._printed_at = now
            beside = "".join(f"  {name} {text}" for name, text in notes.items())
            of = f"{total:,}" if total else "?"
            print(f"step {step:,} of {of}{beside}{self._left(now, step, total)}", flush=True)

    def tick(self) -> None:
        """Shows that time passes while the bar stands."""
        if self._line is not None and self._has_bar:
            self._line.refresh()

    def pause(self) -> None:
        """After a stop the rate starts anew."""
        self.clear()
        self._began = None

    def clear(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line, self._has_bar = None, False

    def _left(self, now: float, step: int, total: int | None) -> str:
        assert self._began is not None
        begun, first = self._began
        if total is None or not first < step < total:
            return ""
        return f"  {duration((now - begun) / (step - first) * (total - step))} left"
