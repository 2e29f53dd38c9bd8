"""Jobs that were submitted: where they are, and how to end them. The same questions for SLURM and this machine."""

import socket
import time
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from cvae.errors import UserError
from slurm import local
from slurm.client import JobState, Slurm


class Submission(BaseModel):
    """One time that a job was handed to SLURM or to this machine; as it stands in launch.json."""

    model_config = ConfigDict(extra="ignore")

    time: float
    cluster: str
    executor: Literal["slurm", "local"]
    job_id: str
    host: str
    """Where it was submitted from; for a local job also where it runs."""
    nodes: int
    gpus: int
    """The total that was asked for; the world size where the machine holds so many."""
    world_size: int
    slurm_conf: str | None = None
    process_started: float = 0.0
    """Of a local job's controller, whose pid is the job id."""
    command: str = ""
    journal_offset: int = 0
    """Bytes of the journal that were there before."""
    cancelled: float | None = None
    code: str | None = None
    """The snapshot of the code that it runs: a folder of that name is under the run's code/."""

    @property
    def where(self) -> str:
        """As "job 12 on testcluster"."""
        name = f"process {self.job_id}" if self.executor == "local" else f"job {self.job_id}"
        return f"{name} on {self.host if self.executor == 'local' else self.cluster}"


def look(submission: Submission) -> JobState:
    """Where the job is now; phase "unknown" where that cannot be told from here."""
    if submission.executor == "slurm":
        return Slurm(submission.slurm_conf).job(submission.job_id)
    if submission.host != socket.gethostname():
        return JobState("unknown", "UNKNOWN", f"it runs on {submission.host}; ask there")
    return local.look(int(submission.job_id), submission.process_started)


def end(submission: Submission, patience_s: float, tell: Callable[[str], None]) -> JobState:
    """Ends the job and waits until it has ended.

    A running job's ranks get SIGTERM, on which they save at the next step, and `patience_s` for it before they
    are killed. Raises UserError where the job cannot be reached from here.
    """
    state = look(submission)
    if state.phase == "unknown":
        raise UserError(f"{submission.where}: {state.reason}")
    if submission.executor == "slurm":
        slurm = Slurm(submission.slurm_conf)
        if state.phase == "running":
            tell(f"told the ranks of {submission.where} to save")
            slurm.tell_to_save(submission.job_id)
            state = _wait(submission, patience_s)
        if state.alive:
            slurm.cancel(submission.job_id)
            # SLURM itself kills after KillWait, by default 30 s.
            state = _wait(submission, 90)
    elif state.alive:
        pid, started = int(submission.job_id), submission.process_started
        tell(f"told the ranks of {submission.where} to save")
        local.tell_to_save(pid, started)
        state = _wait(submission, patience_s)
        if state.alive:
            tell(f"not ended after {patience_s:.0f} s: killing it")
            local.kill(pid, started)
            state = _wait(submission, 10)
    return state


def _wait(submission: Submission, seconds: float) -> JobState:
    deadline = time.monotonic() + seconds
    while (state := look(submission)).alive and time.monotonic() < deadline:
        time.sleep(0.5)
    return state
