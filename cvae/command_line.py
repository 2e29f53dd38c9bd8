"""What every script shares: how it reads its arguments, and how it ends."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from cvae.errors import UserError
from cvae.redaction import guard_output, without_secrets

_MENDABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
}


class Parser(argparse.ArgumentParser):
    """argparse with one line for a mistake instead of the whole usage, and no guessing at cut options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """For add_argument(type=positive): a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def files_and_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """Words of a command line that name files, and those of the form key=value."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    return files, [word for word in words if word not in files]


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Calls main with the arguments and exits with its status.

    What the person at the keyboard can mend (UserError; a full disk, a file without permission) is
    one line on stderr and status 2; Ctrl-C is status 130; SIGPIPE (`… | head`) is silent.
    """
    guard_output()
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        _stop(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in _MENDABLE:
            raise
        where = f": {error.filename}" if error.filename else ""
        _stop(f"{error.strerror}{where}", 2)
    sys.exit(status)


def _stop(message: str, status: int) -> NoReturn:
    print(f"error: {without_secrets(message)}", file=sys.stderr)
    sys.exit(status)
