"""The exception for errors that the user can correct, and functions that word error messages."""

import difflib
import reprlib
from collections.abc import Iterable

# How PyTorch's RuntimeErrors begin if the host or a GPU has no memory left.
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory")
_LONGEST_LINE = 400
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 12, 12, 6
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 100
HINTS: dict[str, str] = {}
"""The texts of hints by key, with fields in braces; the package `workflows` fills it."""


class UserError(Exception):
    """An error that the user can correct: one line with what is wrong, where, and what would be right.

    Commands print it as ``error: …`` and exit with status 2.

    hint: a key of `HINTS`, whose text the commands append, formatted with `values`. In this way a
    library function can suggest a command without knowing the command line.
    """

    def __init__(self, message: str, hint: str = "", **values: object) -> None:
        super().__init__(message)
        self.hint, self.values = hint, values

    def with_hint(self) -> str:
        """Returns the message, followed by the text of its hint if the running program has one."""
        text = HINTS.get(self.hint, "").format(**self.values)
        return f"{self}; {text}" if text else str(self)


def shown(value: object) -> str:
    """Returns the repr of any value for a message, cut to 200 characters."""
    try:
        return cut(_REPR.repr(value), 200)
    except (ValueError, RecursionError):
        # Python does not print integers of thousands of digits.
        return f"a huge {type(value).__name__}"


def one_line(text: object) -> str:
    """Returns the text as one line for a terminal: unprintable characters escaped, cut to 400."""
    line = cut(" ".join(str(text).split()), _LONGEST_LINE)
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return cut(escaped, _LONGEST_LINE)


def cut(text: str, most: int) -> str:
    """Returns the text, or its beginning and end around "…" if it has more than `most` characters."""
    tail = most // 3
    return text if len(text) <= most else f"{text[: most - tail - 1]}…{text[-tail:]}"


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
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(known[key] for key in near)}?" if near else ""


def in_words(error: BaseException) -> str:
    """Returns "ValueError: …", or "out of memory: RuntimeError: …"."""
    text = f"{type(error).__name__}: {error}"
    lacks_memory = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )
    return f"out of memory: {text}" if lacks_memory else text
