"""One writer of a run's journal at a time."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cvae.distributed.ranks import Ranks
from cvae.errors import UserError
from cvae.files.file_lock import Locked, file_lock
from cvae.run.directory import RunDirectory

# A try that was ended from outside may need so long to be gone.
_LOCK_PATIENCE_S = 90.0


@contextmanager
def exclusively(run: RunDirectory, ranks: Ranks) -> Iterator[None]:
    """Holds the run's lock on rank 0; raises UserError on all ranks where another process holds it.

    A job that is tried again waits a while: an earlier try of it may still be dying.
    """
    patience_s = _LOCK_PATIENCE_S if "CVAE_RESTARTED" in os.environ else 0.0
    with ExitStack() as held:
        free = True
        if ranks.is_first:
            try:
                held.enter_context(file_lock(run.path / "train.lock", patience_s))
            except Locked:
                free = False
        if not ranks.tell(free):
            error = RuntimeError if patience_s else UserError
            raise error(f"{run.name} is being trained or evaluated by another process already")
        yield
