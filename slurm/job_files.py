"""The files that a job leaves in its folder, by name."""

from pathlib import Path

CONTROLLER_LOG = "controller.out"
TRY_MARK = "=== try "
"""Begins the lines of a log that say where a try begins ("=== try 2 on n1, n2") and why it ended."""


def log_file(folder: Path, job_id: str, rank: int) -> Path:
    """Where a rank writes; SLURM's own messages are in rank 0's."""
    return folder / f"{job_id}_{rank}_log.out"


def failure_file(folder: Path, job_id: str, rank: int) -> Path:
    """Where a rank writes why it ends badly, as far as it still can."""
    return folder / f"{job_id}_{rank}_failure.json"


def result_file(folder: Path, job_id: str) -> Path:
    """Where rank 0 writes how the function ended: its result's status and reason."""
    return folder / f"{job_id}_0_result.json"


def of_one_try(folder: Path, job_id: str) -> list[Path]:
    """The files above that the next try of the job must not find."""
    failures = sorted(folder.glob(f"{job_id}_*_failure.json"))
    return [*failures, result_file(folder, job_id)]


def tries_file(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_tries.json"


def cancelled_mark(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_cancelled"
