"""Jobs that were submitted: where they are, and how to end them. The same questions for SLURM and this machine."""

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
from slurm.commands import JobState, Slurm, is_final

_POLL_S = 0.5
# A controller that is being restarted loses no request for good.
_CANCEL_EVERY_S, _CANCEL_PATIENCE_S = 10.0, 90.0


class Submission(BaseModel):
    """One time that a job was handed to SLURM or to this machine; as it stands in launch.json."""

    model_config = ConfigDict(extra="ignore")

    time: float
    cluster: str
    executor: Literal["slurm", "local"]
    job_id: str = Field(pattern=r"^[0-9]+(-\w+)?$")
    host: str
    """Where it was submitted from; for a local job also where it runs."""
    nodes: int
    gpus: int
    """The total that was asked for; the world size where the machine holds so many."""
    world_size: int
    slurm_conf: str | None = None
    machine: str = ""
    """What a local job runs on, whatever the host is called now; "" in older files."""
    process_started: float = 0.0
    """Of a local job's controller, with whose pid the job id begins."""
    command: str = ""
    journal_offset: int = Field(0, ge=0)
    """Bytes of the journal that were there before."""
    cancelled: float | None = None
    code: str | None = None
    """The snapshot of the code that it runs: a folder of that name is under the run's code/."""
    folder: str = ""
    """Of the run or sweep whose job it is; "" in older files."""
    copied: bool = False
    """It was found in a copy of that folder: what happens to the copy must not touch the job."""

    @property
    def pid(self) -> int:
        """Of a local job's controller."""
        return local_jobs.pid_of(self.job_id)

    @property
    def where(self) -> str:
        """As "job 12 on testcluster"."""
        name = f"process {self.pid}" if self.executor == "local" else f"job {self.job_id}"
        return f"{name} on {self.host if self.executor == 'local' else self.cluster}"


_ANOTHERS = JobState("ended", "NONE", "its job belongs to the folder that it is a copy of")


def found_in(folder: Path, submissions: list[Submission]) -> list[Submission]:
    """Returns the submissions that a folder lists; those of the folder that it is a copy of are marked.

    A folder that was moved keeps its jobs: where they were submitted from nothing stands any more.
    """

    def copied(one: Submission) -> bool:
        try:
            return bool(one.folder) and not os.path.samefile(one.folder, folder)
        except OSError:
            return False

    return [one.model_copy(update={"copied": one.copied or copied(one)}) for one in submissions]


def look(submission: Submission) -> JobState:
    """Where the job is now; phase "unknown" if that cannot be told from here."""
    if submission.copied:
        return _ANOTHERS
    if submission.executor == "slurm":
        return Slurm(submission.slurm_conf).job(submission.job_id)
    same = submission.machine and submission.machine == this_machine()
    if same or submission.host == socket.gethostname():
        return local_jobs.look(submission.pid, submission.process_started)
    return JobState("unknown", "UNKNOWN", f"it was started on {submission.host}, which is not here")


def requeue_warning(submission: Submission) -> str | None:
    """Warns of a job that SLURM will not put back into its queue, as some sites' submit filters have it."""
    if submission.executor == "local":
        return None
    with suppress(UserError):
        if Slurm(submission.slurm_conf).details(submission.job_id).get("Requeue") == "0":
            return (
                f"SLURM has set Requeue=0 for {submission.where}: after a crash, a preemption or the time limit"
                " a run must be resumed by hand"
            )
    return None


def this_machine() -> str:
    """Names the boot and the container (its PID namespace) that this process belongs to.

    A pid says something only within them, and a host may be given another name.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def look_at_all(submissions: Sequence[Submission]) -> list[JobState]:
    """Returns the same for many, and asks each SLURM once."""
    states: dict[tuple[str | None, str], JobState] = {}
    asked = {
        (one.slurm_conf, one.job_id)
        for one in submissions
        if one.executor == "slurm" and not one.copied
    }
    for conf in {conf for conf, _ in asked}:
        ids = [id for of, id in asked if of == conf]
        states |= {(conf, id): state for id, state in Slurm(conf).jobs(ids).items()}
    return [
        look(one) if one.executor == "local" or one.copied else states[one.slurm_conf, one.job_id]
        for one in submissions
    ]


def end(submission: Submission, patience_s: float, tell: Callable[[str], None]) -> JobState:
    """Ends the job and waits until it has ended; returns its last known state.

    A running job's ranks get SIGTERM, on which they save at the next step, and `patience_s` for it before they
    are killed. A SLURM that does not say how the job stands is told to cancel it all the same; the state stays
    "unknown" if it never says. Raises UserError if a local job cannot be reached from here.
    """
    if submission.executor == "slurm":
        return _end_in_slurm(submission, patience_s, tell)
    state = look(submission)
    if state.phase == "unknown":
        raise UserError(f"{submission.where}: {state.reason}")
    if state.alive:
        pid, started = submission.pid, submission.process_started
        tell(f"told the ranks of {submission.where} to save")
        local_jobs.tell_to_save(pid, started)
        state = _wait(submission, patience_s)
        if state.alive:
            tell(f"not ended after {patience_s:.0f} s: killing it")
            local_jobs.kill(pid, started)
            state = _wait(submission, 10)
    return state


def _end_in_slurm(
    submission: Submission, patience_s: float, tell: Callable[[str], None]
) -> JobState:
    slurm, job_id = Slurm(submission.slurm_conf), submission.job_id
    state = look(submission)
    if state.phase in ("running", "unknown"):
        try:
            slurm.tell_to_save(job_id)
            tell(f"told the ranks of {submission.where} to save")
            state = _wait(submission, patience_s)
        except UserError as error:
            tell(f"could not tell the ranks of {submission.where} to save: {error}")
    # SLURM itself kills after KillWait, by default 30 s.
    deadline = time.monotonic() + _CANCEL_PATIENCE_S
    said = ""
    while state.phase != "ended" and time.monotonic() < deadline:
        try:
            slurm.cancel(job_id)
        except UserError as error:
            if said != str(error):
                said = str(error)
                tell(f"scancel failed: {said}")
            if is_final(said):
                break
        state = _wait(submission, _CANCEL_EVERY_S)
    return state


def _wait(submission: Submission, seconds: float) -> JobState:
    """Until the job is known to have ended; unknown is not ended."""
    deadline = time.monotonic() + seconds
    while (state := look(submission)).phase != "ended" and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return state
