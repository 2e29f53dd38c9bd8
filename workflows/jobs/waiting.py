"""Submits a job, waits for it with its progress on the screen, and reports how it ended."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from slurm import executors, job_state
from slurm.cluster_file import Place, Placement
from slurm.commands import DONE, JobState
from slurm.executors import Job
from slurm.failure_diagnosis import Failure, first_failure
from slurm.job_state import Submission
from workflows.jobs.submission import END_PATIENCE_S, interrupts_wait
from workflows.terminal.formatting import shown

_POLL_S = {"slurm": 3.0, "local": 0.5}
# Network file systems show late what other hosts have written.
_LAG_S = 90.0


class FinishedJob(NamedTuple):
    submission: Submission
    state: JobState
    folder: Path
    failure: Failure | None
    """The rank that failed first; None if no trace of a failure was found."""

    @property
    def cause(self) -> str:
        """ "rank 1 on n2: MemoryError", or "it ended as TIMEOUT"."""
        return str(self.failure) if self.failure else f"it ended as {self.state.slurm_state}"

    @property
    def log(self) -> str:
        """The log of the rank that failed first, or the folder of all logs."""
        return shown(self.failure.log if self.failure else self.folder)


def run_and_wait(
    job: Job,
    place: Place,
    placement: Placement,
    gpus: int,
    show: Callable[[Submission, JobState], object] = lambda submission, state: None,
    is_complete: Callable[[], bool] = lambda: True,
    is_enough: Callable[[], bool] = lambda: False,
    kept: str = "",
    on_submit: Callable[[Submission], object] = lambda submission: None,
    poll_s: float | None = None,
) -> FinishedJob:
    """Runs a job and returns once it has ended; Ctrl-C and any other exception end the job first.

    gpus: as requested; placement may hold fewer ranks. show: displays progress at each poll. is_complete: returns
    whether the job's results are on this host; they are awaited for a while after a job that SLURM reports as
    completed. is_enough: ends the job early. kept: what of its work an interrupted job leaves, for the message.
    on_submit: records the submission. Raises UserError if SLURM refuses the job.
    """
    with interrupts_wait():
        submission = executors.submit(job, place, placement, gpus)
        on_submit(submission)
    pause_s = poll_s or _POLL_S[submission.executor]
    try:
        # The state is queried before the progress is read: what a job wrote before it ended is then shown.
        while True:
            state = job_state.look(submission)
            show(submission, state)
            if state.phase == "ended":
                break
            if is_enough():
                state = job_state.end(submission, 0, lambda _: None)
                return FinishedJob(submission, state, job.folder, None)
            time.sleep(pause_s)
    except BaseException:
        print("; ".join(filter(None, [f"\ncancelling {submission.where}", kept])), flush=True)
        job_state.end(submission, END_PATIENCE_S, lambda _: None)
        raise
    deadline = time.monotonic() + _LAG_S
    while state.slurm_state in DONE and not is_complete() and time.monotonic() < deadline:
        time.sleep(pause_s)
    failure = first_failure(job.folder, submission.job_id)
    return FinishedJob(submission, state, job.folder, failure)


def waiting_text(submission: Submission, state: JobState, working: str) -> str:
    """Returns what to display of a job: `working` if it runs, else that it is queued or cannot be queried."""
    if state.phase == "unknown":
        return f"cannot query {submission.where} ({state.reason}); retrying"
    return f"queued: {submission.where}" if state.phase == "queued" else working
