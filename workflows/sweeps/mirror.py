"""The one writer of a sweep to MLflow: `python -m workflows.sweeps.mirror FOLDER`, until standard input ends.

As a run's own mirror it may lag, die or be killed at any moment: the next one goes on. It ends the parent run
last, so that a parent that has ended has all its children.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cvae.errors import UserError
from cvae.files import paths
from cvae.files.file_lock import file_lock
from cvae.redaction import guard_output
from cvae.run.directory import RunDirectory
from cvae.tracking import mlflow_mirror, mlflow_state
from workflows.sweeps.directory import SweepDirectory

if TYPE_CHECKING:
    from workflows.sweeps.mlflow_parent import SweepMirror

# Without an answer. The allocation waits for it, as long as ray_cluster.py says.
_PATIENCE_AFTER_END_S = 30.0
_WAIT_S = 2.0
_LOCK = "mirror.lock"
_log = logging.getLogger(__name__)


def main(folder: Path) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    mlflow_mirror.step_back()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    guard_output()
    mlflow_mirror.prepare_mlflow()
    from workflows.sweeps.mlflow_parent import SweepMirror

    # One after the other: the mirror of a job that was killed may still be at its last words.
    with file_lock(folder / _LOCK, math.inf):
        try:
            return _follow(SweepMirror(SweepDirectory(folder)))
        except UserError as error:
            _log.error("error: %s", error)
            return 2


def behind(sweep: SweepDirectory) -> int:
    """Returns how many of the sweep's runs, its parent among them, MLflow does not have as they are here."""
    runs = [RunDirectory(paths.runs_dir() / run) for trial in sweep.trials() for run in trial.runs]
    late = sum(mlflow_mirror.behind(run.path) > 0 for run in runs if run.journal_file.exists())
    # Of a sweep it is the bytes of trials.json with which the parent has ended.
    size = sweep.trials_file.stat().st_size if sweep.trials_file.exists() else 0
    return late + (mlflow_state.load(sweep.path).offset != size)


def sync(sweep: SweepDirectory) -> None:
    """Brings all of the sweep to MLflow: its parent and its trials' runs. Raises UserError if that fails."""
    refusal = f"{sweep.name}: its mirror is at work, nothing to sync"
    with file_lock(sweep.path / _LOCK, _PATIENCE_AFTER_END_S, refusal):
        pass
    command = [sys.executable, "-m", "workflows.sweeps.mirror", str(sweep.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"MLflow does not have all of {sweep.name}: {words}")


def sweep_of(run: str) -> SweepDirectory | None:
    """Returns the sweep that a run is part of, if any."""
    for folder in sorted(paths.sweeps_dir().glob("[!.]*")):
        sweep = SweepDirectory(folder)
        try:
            if any(run in trial.runs for trial in sweep.trials()):
                return sweep
        except (OSError, ValueError, TypeError):
            continue  # another sweep's damage
    return None


def _follow(mirror: "SweepMirror") -> int:
    ended_at = None
    while True:
        # Asked before reading: what was written before the end is read below.
        ended = mlflow_mirror.told_end(_WAIT_S if ended_at is None else 0.5)
        if ended and ended_at is None:
            ended_at = time.monotonic()
            mlflow_mirror.hurry(os.getpid())
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
