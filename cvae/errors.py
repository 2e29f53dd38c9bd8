"""The one exception that is meant for the person at the keyboard, and the others in words."""

import difflib
from collections.abc import Iterable

# PyTorch's RuntimeErrors for the host's memory and for a GPU's.
_WANT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory")


class UserError(Exception):
    """Something the user gave us is wrong: one line that says what, where, and what would be right.

    Commands print it as ``error: …`` and exit with code 2; nothing has been written by then.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean a or b?" for a name that is not known; "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def in_words(error: BaseException) -> str:
    """ "ValueError: …", or "out of memory: RuntimeError: …"."""
    text = f"{type(error).__name__}: {error}"
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _WANT_OF_MEMORY)
    return f"out of memory: {text}" if said or isinstance(error, MemoryError) else text
