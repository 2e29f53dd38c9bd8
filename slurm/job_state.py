"""Jobs that were submitted: their states, and how to end them, on SLURM and on this machine alike."""

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cvae.errors import UserError
from slurm import local_jobs
from slurm.commands import JobState, Slurm, SlurmError

_POLL_S = 0.5
# While a controller restarts, a request may get lost.
_CANCEL_EVERY_S, _CANCEL_PATIENCE_S = 10.0, 90.0


class Submission(BaseModel):
    """One submission of a job to SLURM or to this machine; an entry of launch.json."""

    model_config = ConfigDict(extra="ignore")

    time: float
    cluster: str
    executor: Literal["slurm", "local"]
    job_id: str = Field(pattern=r"^[0-9]+(-\w+)?$")
    host: str  # where it was submitted from; a local job also runs there
    nodes: int
    gpus: int  # the requested total; the world size if the machine has that many
    world_size: int
    slurm_conf: str | None = None
    machine: str = ""  # what a local job runs on, even if the host is renamed; "" in older files
    process_started: float = 0.0
    """When the controller of a local job was started, whose pid begins the job's id."""
    command: str = ""
    journal_offset: int = Field(0, ge=0)  # Bytes of the journal before the submission
    cancelled: float | None = None
    code: str | None = None
    """The snapshot of the code that it runs, as a folder's name under the run's code/."""
    folder: str = ""  # that of its run or sweep; "" in older files
    copied: bool = False
    """It was found in a copy of that folder: what happens to the copy must not affect the job."""

    @property
    def pid(self) -> int:
        """That of a local job's controller."""
        return local_jobs.pid_of(self.job_id)

    @property
    def where(self) -> str:
        """Returns e.g. "job 12 on testcluster"."""
        name = f"process {self.pid}" if self.executor == "local" else f"job {self.job_id}"
        return f"{name} on {self.host if self.executor == 'local' else self.cluster}"


_JOB_OF_THE_ORIGINAL = JobState(
    "ended", "NONE", "its job belongs to the folder that it is a copy of"
)


def found_in(folder: Path, submissions: list[Submission]) -> list[Submission]:
    """Returns the submissions that a folder lists, marked if they belong to a folder that it is a copy of.

    A folder that was moved keeps its jobs: the path that they were submitted for no longer exists.
    """

    def is_copied(submission: Submission) -> bool:
        try:
            return bool(submission.folder) and not os.path.samefile(submission.folder, folder)
        except OSError:
            return False

    return [one.model_copy(update={"copied": one.copied or is_copied(one)}) for one in submissions]


def look(submission: Submission) -> JobState:
    """Returns the job's state; its phase is "unknown" if that cannot be found out from here."""
    return look_at_all([submission])[0]


def look_at_all(submissions: Sequence[Submission]) -> list[JobState]:
    """Returns the states of many jobs with one query of each SLURM. See look()."""
    ids: dict[str | None, dict[str, None]] = {}
    for one in submissions:
        if one.executor == "slurm" and not one.copied:
            ids.setdefault(one.slurm_conf, {})[one.job_id] = None
    states = {conf: Slurm(conf).jobs(list(ids[conf])) for conf in ids}

    def state(one: Submission) -> JobState:
        if one.copied:
            return _JOB_OF_THE_ORIGINAL
        if one.executor == "slurm":
            return states[one.slurm_conf][one.job_id]
        return _look_here(one)

    return [state(one) for one in submissions]


def _look_here(submission: Submission) -> JobState:
    is_here = submission.machine and submission.machine == this_machine()
    if is_here or submission.host == socket.gethostname():
        return local_jobs.look(submission.pid, submission.process_started)
    return JobState("unknown", "UNKNOWN", f"it was started on {submission.host}, which is not here")


def requeue_warning(submission: Submission) -> str | None:
    """Returns a warning if SLURM will not requeue the job, as the submit filters of some sites arrange."""
    if submission.executor == "slurm":
        with suppress(SlurmError):
            details = Slurm(submission.slurm_conf).details(submission.job_id)
            if details.get("Requeue") == "0":
                return (
                    f"SLURM has set Requeue=0 for {submission.where}: after a crash, a preemption or the"
                    " time limit a run must be resumed by hand"
                )
    return None


def this_machine() -> str:
    """Returns a name for the boot and the container (its PID namespace) that this process belongs to.

    Only within them does a pid identify a process, and a host may be renamed.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def end(submission: Submission, patience_s: float, report: Callable[[str], None]) -> JobState:
    """Ends the job and waits until it has ended; returns its last known state.

    The ranks of a running job get SIGTERM, on which they save at the next step, and are killed after patience_s.
    If SLURM does not give the job's state, the job is cancelled all the same, and the phase stays "unknown" if
    SLURM never gives it. report: called with a line about each step. Raises UserError if a local job is out of
    reach.
    """
    if submission.executor == "slurm":
        return _end_in_slurm(submission, patience_s, report)
    state = look(submission)
    if state.phase == "unknown":
        raise UserError(f"{submission.where}: {state.reason}")
    if state.alive:
        pid, started = submission.pid, submission.process_started
        report(f"asked the ranks of {submission.where} to save")
        local_jobs.tell_to_save(pid, started)
        state = _wait(submission, patience_s)
        if state.alive:
            report(f"not ended after {patience_s:.0f} s: killing it")
            local_jobs.kill(pid, started)
            state = _wait(submission, 10)
    return state


def _end_in_slurm(
    submission: Submission, patience_s: float, report: Callable[[str], None]
) -> JobState:
    slurm, job_id = Slurm(submission.slurm_conf), submission.job_id
    state = look(submission)
    if state.phase in ("running", "unknown"):
        try:
            slurm.tell_to_save(job_id)
            report(f"asked the ranks of {submission.where} to save")
            state = _wait(submission, patience_s)
        except SlurmError as error:
            report(f"could not tell the ranks of {submission.where} to save: {error}")
    # SLURM itself kills after KillWait, by default 30 s.
    deadline = time.monotonic() + _CANCEL_PATIENCE_S
    complaint = ""
    while state.phase != "ended" and time.monotonic() < deadline:
        try:
            slurm.cancel(job_id)
        except SlurmError as error:
            if complaint != str(error):
                complaint = str(error)
                report(f"scancel failed: {complaint}")
            if error.is_final:
                break
        state = _wait(submission, _CANCEL_EVERY_S)
    return state


def _wait(submission: Submission, seconds: float) -> JobState:
    """Waits until the job is known to have ended; an unknown state is not an end."""
    deadline = time.monotonic() + seconds
    while (state := look(submission)).phase != "ended" and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return state
