"""Calls a function in a process that can crash or hang without harm to the rest.

The process is forked from one that has imported PyTorch and the product, and has done nothing else: to import them
anew would take each check some seconds.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.gpu_check.imports"])


def call(
    function: Callable[..., None], arguments: tuple[Any, ...], log: Path, limit_s: float
) -> int | None:
    """Returns the exit status, negative for a signal, or None if it was ended after limit_s.

    In either case, all of its children have been ended, too. log: where it writes what it has to say.
    """
    log.touch()
    process = _FORKS.Process(target=_called, args=(function, arguments, log))
    process.start()
    try:
        process.join(limit_s)
        return process.exitcode
    finally:
        # Its session is its own, so this meets nothing else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()
        process.join()


def _called(function: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
    os.setsid()
    said = os.open(log, os.O_WRONLY)
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    function(*arguments)
