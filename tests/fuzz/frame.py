"""What every fuzzer shares: the table of targets, and the judgement of a case."""

import contextlib
import io
import random
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from cvae.errors import UserError, one_line

SECONDS = 5.0
LONGEST_LINE = 400


class Case(NamedTuple):
    shown: str
    """The input, for the person who has to find out what is wrong."""
    read: Callable[[], object]
    """Reads the input. It may return or raise UserError; an AssertionError says what was wrongly accepted."""


class Finding(NamedTuple):
    target: str
    case: str
    """Seed and number: it makes the same input again."""
    kind: str
    """traceback, hang, long line, several lines or wrongly accepted."""
    detail: str
    shown: str


class Outcome(NamedTuple):
    """What a command printed, and the line with which it refused its input; "" if it did not."""

    out: str
    refusal: str


Target = Callable[[random.Random, Path], Case]
TARGETS: dict[str, Target] = {}
_SECONDS: dict[str, float] = {}


class _TooSlow(BaseException):
    """Not an Exception: code under test may catch those."""


def target(name: str, seconds: float = SECONDS) -> Callable[[Target], Target]:
    """seconds: after which a case hangs."""

    def register(function: Target) -> Target:
        TARGETS[name], _SECONDS[name] = function, seconds
        return function

    return register


def fuzz(name: str, cases: int, seed: int, counts: Counter[str] | None = None) -> Iterator[Finding]:
    """Yields what is wrong with `cases` inputs. counts: gets the number of accepted and of refused ones."""
    counts = Counter() if counts is None else counts
    for number in range(cases):
        label = f"{seed}:{number}"
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            case = TARGETS[name](random.Random(label), Path(folder))
            kind, detail = judge(case.read, _SECONDS[name])
        counts[kind] += 1
        if kind not in ("accepted", "refused"):
            yield Finding(name, label, kind, detail, case.shown)


def judge(read: Callable[[], object], seconds: float = SECONDS) -> tuple[str, str]:
    """Returns "accepted", "refused" or what is wrong, and the message or the end of the traceback."""
    previous = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            read()
    except UserError as error:
        message = str(error)
        if "\n" in message or "\r" in message:
            return "several lines", message[:500]
        if len(message) > LONGEST_LINE:
            return "long line", f"{len(message):,} characters: {message[:300]}"
        return "refused", message
    except SystemExit as end:
        return ("accepted", "") if end.code in (0, None) else ("traceback", f"exit {end.code}")
    except _TooSlow:
        return "hang", f"longer than {seconds:g} s"
    except AssertionError as error:
        return "wrongly accepted", str(error)[:500]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error)[:200] if not isinstance(error, RecursionError) else ""
        return "traceback", f"{type(error).__name__}: {said} ({place.filename}:{place.lineno})"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return "accepted", ""


def command(main: Callable[[list[str]], int], words: list[str], *names: str) -> Outcome:
    """Calls a script's main and fails if its status is not 0, or if its refusal names none of `names`."""
    out = io.StringIO()
    refusal = ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(words)
            assert status == 0, f"exit status {status}: {out.getvalue()[-300:]}"
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            # As command_line.run prints it.
            if error.filename is None:
                raise
            refusal = f"{error.strerror}: {error.filename}"
    if refusal:
        assert any(name in refusal for name in names), f"it names no file: {refusal}"
        assert "input_value" not in refusal, f"pydantic's own words: {refusal}"
        assert "\n" not in refusal, f"several lines: {refusal}"
    assert "Traceback (most recent" not in out.getvalue(), f"printed: {out.getvalue()[-300:]}"
    return Outcome(out.getvalue(), one_line(refusal))


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _TooSlow
