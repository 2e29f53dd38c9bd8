"""What every script shares: how it reads its arguments, and how it ends."""

import argparse
import codecs
import errno
import importlib.util
import locale
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from cvae.errors import UserError, cut, one_line, shown
from cvae.files.paths import PROJECT_ROOT
from cvae.redaction import guard_output, without_secrets

# What the machine says of a file, a disk or a limit; every error that names a file is one of these, too.
_MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.ENXIO),
}
# Beyond it no machine follows, and SLURM's own numbers end.
_MOST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake instead of the whole usage, and no guessing at cut options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{cut(message, 300)}; see {self.prog} --help")


def positive(text: str) -> int:
    """For add_argument(type=positive): a whole number above 0 and below 2³¹."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if not 0 < number <= _MOST:
        raise argparse.ArgumentTypeError(
            f"{cut(text, 50)} is not a whole number above 0 and below 2³¹"
        )
    return number


def files_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of a command line that name files, and those of the form key=value."""
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    return files, [word for word in words if word not in files]


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Calls main with the arguments and exits with its status.

    What the person at the keyboard can mend (UserError; a full disk, a file without permission) is
    one line on stderr and status 2; Ctrl-C is status 130; SIGPIPE (`… | head`) is silent. A
    traceback means a fault of the project.
    """
    _open_streams()
    _speak_utf8()
    guard_output()
    try:
        _check_surroundings(sys.argv[1:])
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _stop(f"error: {one_line(without_secrets(error.with_hint()))}", 2)
    except KeyboardInterrupt:
        _stop("error: interrupted", 130)
    except BrokenPipeError:
        _stop("", 128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _MENDABLE and error.filename is None:
            raise
        where = f": {error.filename}" if error.filename is not None else ""
        _stop(f"error: {one_line(without_secrets(f'{error.strerror}{where}'))}", 2)
    _stop("", status)


def _open_streams() -> None:
    """Gives a closed stdin, stdout or stderr (`>&-`) to /dev/null, before a file takes its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            # It has the lowest number that is free: this one.
            os.set_inheritable(null, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _speak_utf8() -> None:
    """Starts Python anew in its UTF-8 mode if the locale has another encoding; so do all its children."""
    encoding = codecs.lookup(locale.getpreferredencoding(False)).name
    if encoding == "utf-8" or "PYTHONUTF8" in os.environ:
        return
    with suppress(OSError):
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            {**os.environ, "PYTHONUTF8": "1"},
        )


def _check_surroundings(arguments: list[str]) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one") from None
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UserError(f"the argument {shown(argument)} is not text in UTF-8")


def _stop(line: str, status: int) -> NoReturn:
    # A stream that is full or closed cannot take the message, nor what Python would flush at exit.
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n" if line else "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _check_packages() -> None:
    """Ends the process with one line if another module of the same name hides one of ours."""
    for name in ("slurm", "workflows", "analysis"):
        found = importlib.util.find_spec(name)
        origin = found.origin if found is not None else None
        if origin is not None and PROJECT_ROOT not in Path(origin).resolve().parents:
            _stop(
                f"error: {one_line(origin)} hides this project's package {name}; take its folder"
                " out of PYTHONPATH or rename it",
                2,
            )


# Now: a script's next lines import what is hidden.
_check_packages()
