"""What all scripts share: how they read their arguments and how they end."""

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

# Errors of a file, a disk or a limit; every error that names a file is reported in the same way.
_CORRECTABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENODEV, errno.ENXIO),
}
_LARGEST = 2**31 - 1  # SLURM's own numbers end here


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports a mistake in one line and takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{cut(message, 300)}; see {self.prog} --help")


def positive(text: str) -> int:
    """Returns a whole number above 0 and below 2³¹; for add_argument(type=positive)."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if not 0 < number <= _LARGEST:
        raise argparse.ArgumentTypeError(
            f"{cut(text, 50)} is not a whole number above 0 and below 2³¹"
        )
    return number


def files_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Splits the words of a command line into those that name files and those of the form key=value."""
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    return files, [word for word in words if word not in files]


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Calls main with the arguments and exits with its status.

    What the user can correct (UserError, a full disk, a file without permission) becomes one line on
    stderr and status 2; Ctrl-C becomes status 130; a closed pipe (`… | head`) ends silently. A
    traceback means a fault of the project.
    """
    _open_streams()
    _use_utf8()
    guard_output()
    try:
        _check_surroundings(sys.argv[1:])
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _fail(error.with_hint())
    except KeyboardInterrupt:
        _exit("error: interrupted", 130)
    except BrokenPipeError:
        _exit("", 128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _CORRECTABLE and error.filename is None:
            raise
        _fail(f"{error.strerror}{'' if error.filename is None else f': {error.filename}'}")
    _exit("", status)


def _open_streams() -> None:
    """Opens /dev/null for a closed stdin, stdout or stderr (`>&-`), before a file gets its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free: this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _use_utf8() -> None:
    """Restarts Python in its UTF-8 mode, which children inherit, if the locale has another encoding."""
    encoding = codecs.lookup(locale.getpreferredencoding(False)).name
    if encoding == "utf-8" or "PYTHONUTF8" in os.environ:
        return
    command = [sys.executable, *sys.orig_argv[1:]]
    with suppress(OSError):
        os.execve(sys.executable, command, {**os.environ, "PYTHONUTF8": "1"})


def _check_surroundings(arguments: list[str]) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder has been deleted; change to another one") from None
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise UserError(f"the argument {shown(argument)} is not text in UTF-8")


def _fail(message: str) -> NoReturn:
    _exit(f"error: {one_line(without_secrets(message))}", 2)


def _exit(line: str, status: int) -> NoReturn:
    # A full or closed stream takes neither the message nor what Python would flush at exit.
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{line}\n" if line else "")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _check_packages() -> None:
    """Ends the process with one line if another package of the same name hides one of ours."""
    for name in ("slurm", "workflows", "analysis"):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and PROJECT_ROOT not in Path(spec.origin).resolve().parents:
            _fail(
                f"{spec.origin} hides this project's package {name}; take its folder out of"
                " PYTHONPATH or rename it"
            )


_check_packages()  # before the script's next lines import what is hidden
