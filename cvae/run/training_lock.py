"""The lock by which one process at a time writes to a run's journal."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.files.file_lock import Locked, file_lock
from cvae.run.directory import RunDirectory

# An attempt that was ended from outside may take so long to exit.
_LOCK_PATIENCE_S = 90.0


@contextmanager
def exclusively(run: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """Holds the run's lock on rank 0. Raises UserError on all ranks if another process holds it.

    A restarted job waits for a while, since its previous attempt may still be exiting.
    """
    patience_s = _LOCK_PATIENCE_S if "CVAE_RESTARTED" in os.environ else 0.0
    with ExitStack() as lock:
        acquired = True
        if ranks.is_first:
            try:
                lock.enter_context(file_lock(run.path / "train.lock", patience_s))
            except Locked:
                acquired = False
        if not ranks.tell(acquired):
            error = RuntimeError if patience_s else UserError
            raise error(f"{run.name} is being trained or evaluated by another process already")
        yield
