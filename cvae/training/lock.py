"""One writer of a run's journal at a time."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from cvae.errors import UserError
from cvae.run_directory import RunDirectory
from cvae.training.ranks import Ranks

# A try that was ended from outside may need so long to be gone.
_LOCK_PATIENCE_S = 90.0


@contextmanager
def exclusively(run: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """Holds the run's lock on rank 0; raises UserError on all ranks where another process holds it.

    A job that is tried again waits a while: an earlier try of it may still be dying.
    """
    patience_s = _LOCK_PATIENCE_S if "CVAE_RESTARTED" in os.environ else 0.0
    with open(run.path / "train.lock", "a") as lock:
        free = not ranks.is_first or wait_for_lock(lock, patience_s)
        if not ranks.tell(free):
            error = RuntimeError if patience_s else UserError
            raise error(f"{run.name} is being trained or evaluated by another process already")
        yield


def wait_for_lock(lock: TextIO, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)
        else:
            return True
