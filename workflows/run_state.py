"""How a run stands: what its journal says, and what has become of its last job."""

import json
from typing import Any, NamedTuple

from cvae.data.store import MANIFEST, store_path
from cvae.errors import UserError
from cvae.run_directory import RunDirectory
from cvae.training import journal
from slurm import queue, tries
from slurm.client import JobState
from slurm.queue import Submission

Line = dict[str, Any]
NO_JOB = JobState("ended", "NONE", "it was never submitted")


class RunState(NamedTuple):
    status: str
    """queued | starting | running | stopping | finished | failed | stopped | cancelled | died | unknown."""
    reason: str
    job: JobState


def submissions(run: RunDirectory) -> list[Submission]:
    return [Submission.model_validate(entry) for entry in run.submissions()]


def last_submission(run: RunDirectory) -> Submission | None:
    return next(reversed(submissions(run)), None)


def run_state(run: RunDirectory) -> RunState:
    last = last_submission(run)
    # Asked before reading: what a job wrote before it ended is then read.
    job = NO_JOB if last is None else queue.look(last)
    return judge(_marks(run, last), job, last is not None and last.cancelled is not None)


def brief_status(run: RunDirectory) -> str:
    """The status of run_state(), without asking the queue where the journal settles it: for long lists."""
    last = last_submission(run)
    marks = _marks(run, last)
    status = marks[-1].get("status") if marks else None
    told = tries.read(run.logs, last.job_id) if last else []
    if status == "finished" or (status == "failed" and not (told and told[-1].restarts)):
        return str(status)
    return run_state(run).status


def _marks(run: RunDirectory, last: Submission | None) -> list[Line]:
    """The start and end lines since the last submission."""
    lines = journal.read(run.journal_file, last.journal_offset if last else 0)[0]
    return [line for line in lines if line["kind"] in ("start", "end")]


def judge(marks: list[Line], job: JobState, cancelled: bool) -> RunState:
    """The state of a run from the start and end lines of its last submission, in order, and its job."""
    newest: Line = marks[-1] if marks else {"kind": None}
    if newest["kind"] == "end":
        status, reason = str(newest["status"]), str(newest["reason"])
        if status in ("stopped", "failed") and job.alive:
            # It may be back in the queue, as after a preemption or a crash, or have started again.
            again = job.start is not None and job.start > newest["time"]
            if job.phase == "queued" or again:
                status = "queued" if job.phase == "queued" else "starting"
            elif status == "stopped":
                status = "stopping"
        return RunState(status, reason, job)
    if job.phase == "queued":
        return RunState("queued", job.reason, job)
    started = newest["kind"] == "start"
    if job.phase == "running":
        return RunState("running" if started else "starting", "", job)
    if job.phase == "unknown":
        return RunState("unknown", job.reason, job)
    if cancelled or job.word == "CANCELLED":
        return RunState("cancelled", "before it could save" if started else "before it began", job)
    return RunState("died", job.reason if job is NO_JOB else f"its job ended as {job.word}", job)


def total_steps(run: RunDirectory) -> int | None:
    """None where the data are not here any more."""
    try:
        experiment = run.experiment()
        manifest = store_path(experiment.data.name, experiment.data.image_size) / MANIFEST
        images = json.loads(manifest.read_text())["splits"][experiment.data.train]["images"]
        return experiment.total_steps(int(images))
    except (OSError, ValueError, KeyError, UserError):
        return None


def best_epoch(lines: list[Line]) -> Line | None:
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return min(epochs, key=lambda line: line["metrics"]["val/loss"], default=None)


def newest_step(lines: list[Line]) -> int:
    return max((line["step"] for line in lines if line["kind"] in ("step", "end")), default=0)
