"""The one exception that is meant for the person at the keyboard, and the others in words."""

import difflib
import reprlib
from collections.abc import Iterable

# PyTorch's RuntimeErrors for the host's memory and for a GPU's.
_WANT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory")


class UserError(Exception):
    """An error that the user can correct: one line with what is wrong, where, and what would be right.

    Commands print it as ``error: …`` and exit with status 2.

    hint: a key of ``HINTS``, whose text the commands append, formatted with `values`. In this way a
    library function can suggest a command without knowing the command line.
    """

    def __init__(self, message: str, hint: str = "", **values: object) -> None:
        super().__init__(message)
        self.hint, self.values = hint, values

    def with_hint(self) -> str:
        """Returns the message, followed by the text of its hint if the running program has one."""
        text = HINTS.get(self.hint, "").format(**self.values)
        return f"{self}; {text}" if text else str(self)


HINTS: dict[str, str] = {}
"""The texts of hints, by key; the package `workflows` fills it."""


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


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns "; did you mean a or b?" with the choices nearest to `name`, or "" if none is near.

    Letter case is ignored. Among dotted keys ("model.latent_dim") a key with the same last part is
    nearest, so that a misplaced key is found, too.
    """
    known = {choice.casefold(): choice for choice in choices}
    name = name.casefold()
    if any("." in key and key.replace(".", "_").isidentifier() for key in known):
        leaf = name.rpartition(".")[2]
        leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
        near = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(name, known, 1, 0.75)
        near = near or [leaves[key] for key in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    else:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(known[key] for key in near)}?" if near else ""


def in_words(error: BaseException) -> str:
    """ "ValueError: …", or "out of memory: RuntimeError: …"."""
    text = f"{type(error).__name__}: {error}"
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _WANT_OF_MEMORY)
    return f"out of memory: {text}" if said or isinstance(error, MemoryError) else text
