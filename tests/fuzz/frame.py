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

from cvae.errors import UserError

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


Target = Callable[[random.Random, Path], Case]
TARGETS: dict[str, Target] = {}


class _TooSlow(BaseException):
    """Not an Exception: code under test may catch those."""


def target(name: str) -> Callable[[Target], Target]:
    def register(function: Target) -> Target:
        TARGETS[name] = function
        return function

    return register


def fuzz(name: str, cases: int, seed: int, counts: Counter[str] | None = None) -> Iterator[Finding]:
    """Yields what is wrong with `cases` inputs. counts: gets the number of accepted and of refused ones."""
    counts = Counter() if counts is None else counts
    for number in range(cases):
        label = f"{seed}:{number}"
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            case = TARGETS[name](random.Random(label), Path(folder))
            kind, detail = judge(case.read)
        counts[kind] += 1
        if kind not in ("accepted", "refused"):
            yield Finding(name, label, kind, detail, case.shown)


def judge(read: Callable[[], object]) -> tuple[str, str]:
    """Returns "accepted", "refused" or what is wrong, and the message or the end of the traceback."""
    previous = signal.signal(signal.SIGALRM, _alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
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
        return "hang", f"longer than {SECONDS:g} s"
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


def _alarm(number: int, frame: FrameType | None) -> None:
    raise _TooSlow
