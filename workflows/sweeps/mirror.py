"""The one writer of a sweep to MLflow: `python -m workflows.sweeps.mirror FOLDER`, until standard input ends.

As a run's own mirror it may lag, die or be killed at any moment: the next one goes on.
"""

import logging
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cvae.errors import UserError
from cvae.redaction import guard_output
from cvae.training import mlflow_mirror
from workflows.sweeps.directory import SweepDirectory

if TYPE_CHECKING:
    from workflows.sweeps.mlflow_parent import SweepMirror

# The allocation waits for it.
_PATIENCE_AFTER_END_S = 6.0
_WAIT_S = 2.0
_log = logging.getLogger(__name__)


def main(folder: Path) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    mlflow_mirror.step_back()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    guard_output()
    mlflow_mirror.prepare_mlflow()
    from workflows.sweeps.mlflow_parent import SweepMirror

    try:
        return _follow(SweepMirror(SweepDirectory(folder)))
    except UserError as error:
        _log.error("error: %s", error)
        return 2


def _follow(mirror: "SweepMirror") -> int:
    ended_at = None
    while True:
        # Asked before reading: what was written before the end is read below.
        if mlflow_mirror.told_end(_WAIT_S if ended_at is None else 0.5):
            ended_at = ended_at or time.monotonic()
        try:
            mirror.push()
            if ended_at is not None:
                mirror.end()
                return 0
        except UserError:
            raise
        except Exception as error:
            _log.warning("MLflow is away: %s", mlflow_mirror.one_line(error))
            if ended_at is not None and time.monotonic() - ended_at > _PATIENCE_AFTER_END_S:
                return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
