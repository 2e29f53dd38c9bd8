"""Displays the progress of a run: a live line on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

from workflows.terminal.formatting import duration

_INTERVAL_S = 10.0


class Display:
    """Messages scroll by; the last line shows a status ("queued …") or the progress bar of a running job."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._line: tqdm[Any] | None = None
        self._is_bar = False
        self._printed_at = 0.0
        self._status = ""
        self._began: tuple[float, int] | None = None

    def message(self, text: str) -> None:
        """Prints text that stays."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def status(self, text: str, detail: str = "") -> None:
        """Displays what is going on while there is no progress. A change of detail alone prints no new line."""
        if self._is_terminal:
            line = self._open(is_bar=False, total=0, bar_format="{desc}")
            line.set_description_str(text + detail)
        elif text != self._status:
            print(text + detail, flush=True)
        self._status = text

    def progress(self, step: int, total: int | None, notes: dict[str, str]) -> None:
        """Displays the step, and notes such as {"loss": "237.1"} next to it."""
        now = time.monotonic()
        self._began = self._began or (now, step)
        self._status = ""
        if self._is_terminal:
            bar = self._open(True, total=total, initial=step, unit="step", dynamic_ncols=True)
            bar.set_postfix(notes, refresh=False)
            bar.update(step - bar.n)
        elif now - self._printed_at >= _INTERVAL_S or step == total:
            self._printed_at = now
            texts = "".join(f"  {name} {text}" for name, text in notes.items())
            began, first = self._began
            if total is not None and first < step < total:
                texts += f"  {duration((now - began) / (step - first) * (total - step))} left"
            print(f"step {step:,} of {f'{total:,}' if total else '?'}{texts}", flush=True)

    def tick(self) -> None:
        """Updates the bar's elapsed time while the step does not change."""
        if self._line is not None and self._is_bar:
            self._line.refresh()

    def pause(self) -> None:
        """Removes the bar; the next one measures its rate anew."""
        self.clear()
        self._began = None

    def clear(self) -> None:
        """Removes the live line."""
        if self._line is not None:
            self._line.close()
        self._line = None

    def _open(self, is_bar: bool, **settings: Any) -> "tqdm[Any]":
        """Returns the live line; one of the other kind is replaced."""
        if self._line is None or self._is_bar != is_bar:
            self.clear()
            self._line = tqdm(file=sys.stdout, leave=False, **settings)
            self._is_bar = is_bar
        return self._line
