"""The one exception that is meant for the person at the keyboard, and the others in words."""

import difflib
import reprlib
from collections.abc import Iterable

# PyTorch's RuntimeErrors for the host's memory and for a GPU's.
_WANT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory")


class UserError(Exception):
    """Something the user gave us is wrong: one line that says what, where, and what would be right.

    Commands print it as ``error: …`` and exit with code 2; nothing has been written by then.
    """


_LONGEST_LINE = 400
_VALUES = reprlib.Repr()
_VALUES.maxlevel, _VALUES.maxlist, _VALUES.maxtuple, _VALUES.maxdict = 3, 12, 12, 6
_VALUES.maxstring = _VALUES.maxlong = _VALUES.maxother = 100


def shown(value: object) -> str:
    """Returns the value's repr for a message: of at most 200 characters, whatever the value."""
    try:
        return cut(_VALUES.repr(value), 200)
    except (ValueError, RecursionError):
        # Python does not print whole numbers of thousands of digits.
        return f"a huge {type(value).__name__}"


def one_line(text: object) -> str:
    """Returns text for a terminal: in one line, of at most 400 characters, the unprintable ones escaped."""
    line = " ".join(str(text).split())
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in cut(line, _LONGEST_LINE))
    return cut(escaped, _LONGEST_LINE)


def cut(text: str, most: int) -> str:
    """Returns the text itself or, if it is longer than `most` characters, its two ends around "…"."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 1]}…{text[-tail:]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?" for a name that is not known; "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def in_words(error: BaseException) -> str:
    """ "ValueError: …", or "out of memory: RuntimeError: …"."""
    text = f"{type(error).__name__}: {error}"
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _WANT_OF_MEMORY)
    return f"out of memory: {text}" if said or isinstance(error, MemoryError) else text
