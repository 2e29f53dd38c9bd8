"""The log of a job's attempts, as its supervisor keeps it."""

from pathlib import Path

from slurm import attempts
from slurm.attempts import AttemptEnd
from slurm.supervision import AttemptLog, Supervision

JOB = "12"
AT_LIMIT = "JobState=COMPLETING Reason=TimeLimit Restarts=1"


def opened(folder: Path, max_restarts: int = 3) -> AttemptLog:
    supervision = Supervision(str(folder / "step-*"), "tests.helpers.job_targets:note", str(folder))
    return AttemptLog(folder, JOB, supervision, max_restarts)


def begin(folder: Path) -> None:
    log = opened(folder)
    log.settle("TIMEOUT")
    log.begin(["n1"])


def last_end(folder: Path) -> AttemptEnd:
    end = attempts.read(folder, JOB)[-1].end
    assert end is not None
    return end
