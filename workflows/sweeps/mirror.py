"""Writes a sweep to MLflow: `python -m workflows.sweeps.mirror FOLDER`, until standard input ends.

Like a run's own mirror, it may lag, die or be killed at any moment; the next one goes on. It ends the
parent run last, so that a parent that has ended has all its children.
"""

import logging
import math
import subprocess
import sys
from pathlib import Path

from cvae.errors import UserError
from cvae.files import paths
from cvae.files.file_lock import file_lock
from cvae.run.directory import RunDirectory
from cvae.tracking import mlflow_mirror, mlflow_state
from workflows.sweeps.directory import SweepDirectory

# How long to retry after the end; ray_cluster.py gives the whole mirror about as long.
_PATIENCE_AFTER_END_S = 30.0
_LOCK = "mirror.lock"
_log = logging.getLogger(__name__)


def main(folder: Path) -> int:
    mlflow_mirror.set_up_process()
    from workflows.sweeps.mlflow_parent import SweepMirror

    # The mirror of a job that was killed may not have ended yet.
    with file_lock(folder / _LOCK, math.inf):
        try:
            mirror = SweepMirror(SweepDirectory(folder))
            return mlflow_mirror.follow(mirror.push, mirror.end, _PATIENCE_AFTER_END_S)
        except UserError as error:
            _log.error("error: %s", error)
            return 2


def behind(sweep: SweepDirectory) -> int:
    """Returns how many of the sweep's runs, including its parent, are not up to date in MLflow."""
    runs = [RunDirectory(paths.runs_dir() / run) for trial in sweep.trials() for run in trial.runs]
    late = sum(mlflow_mirror.behind(run.path) > 0 for run in runs if run.journal_file.exists())
    # A sweep's offset is the size of trials.json when the parent run was ended.
    return late + (mlflow_state.load(sweep.path).offset != sweep.trials_size())


def sync(sweep: SweepDirectory) -> None:
    """Brings the sweep's parent run and its trials' runs to MLflow. Raises UserError if that fails."""
    refusal = f"{sweep.name}: its mirror is at work, nothing to sync"
    with file_lock(sweep.path / _LOCK, _PATIENCE_AFTER_END_S, refusal):
        pass
    command = [sys.executable, "-m", "workflows.sweeps.mirror", str(sweep.path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        raise UserError(f"MLflow does not have all of {sweep.name}: {last_line}")


def sweep_of(run: str) -> SweepDirectory | None:
    """Returns the sweep that has a run of that name, if any."""
    for folder in sorted(paths.sweeps_dir().glob("[!.]*")):
        sweep = SweepDirectory(folder)
        try:
            if any(run in trial.runs for trial in sweep.trials()):
                return sweep
        except UserError:
            continue  # another sweep is damaged
    return None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
