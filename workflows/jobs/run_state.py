"""Finds out the state of a run from its journal and its last job."""

from typing import NamedTuple

from pydantic import TypeAdapter

from cvae.config.experiment import Experiment
from cvae.data.draws import chosen_count
from cvae.data.store import MANIFEST, Manifest, store_path
from cvae.errors import UserError
from cvae.files import json_file
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from slurm import attempts, job_state
from slurm.commands import JobState
from slurm.job_state import Submission

_SUBMISSIONS = TypeAdapter(list[Submission])
_MANIFEST = TypeAdapter(Manifest)
NO_JOB = JobState("ended", "NONE", "it was never submitted")


class RunState(NamedTuple):
    status: str
    """queued | starting | running | stopping | finished | failed | stopped | cancelled | died | unknown."""
    reason: str
    job: JobState


def submissions(run: RunDirectory) -> list[Submission]:
    """Returns the run's submissions, oldest first. Raises UserError if launch.json is damaged."""
    return job_state.found_in(run.path, json_file.load(run.launch_file, _SUBMISSIONS) or [])


def last_submission(run: RunDirectory) -> Submission | None:
    return next(reversed(submissions(run)), None)


def run_state(run: RunDirectory) -> RunState:
    last = last_submission(run)
    if last is None:
        return judge(marks_of(journal.read_outline(run.journal_file)), NO_JOB, cancelled=False)
    # The job is queried before the journal is read, so that what it wrote before its end is read.
    job = job_state.look(last)
    marks = marks_of(journal.read_outline(run.journal_file, last.journal_offset))
    return judge(marks, job, last.cancelled is not None)


def is_settled(run: RunDirectory, marks: list[Line], last: Submission | None) -> bool:
    """Returns whether the journal alone determines the state, so that the queue need not be queried."""
    status = marks[-1].get("status") if marks else None
    if status != "failed":
        return status == "finished"
    earlier = attempts.read(run.logs, last.job_id) if last else []
    return not (earlier and earlier[-1].restarts)


def marks_of(lines: list[Line]) -> list[Line]:
    """Returns the start and end lines."""
    return [line for line in lines if line["kind"] in ("start", "end")]


def judge(marks: list[Line], job: JobState, cancelled: bool) -> RunState:
    """Returns the state of a run. marks: the start and end lines since its last submission, in order."""
    newest: Line = marks[-1] if marks else {"kind": None}
    if newest["kind"] == "end":
        status = str(newest["status"])
        if status in ("stopped", "failed") and job.alive:
            # The job may be queued again, as after a preemption or a crash, or have restarted.
            if job.phase == "queued":
                status = "queued"
            elif job.start is not None and job.start > newest["time"]:
                status = "starting"
            elif status == "stopped":
                status = "stopping"
        return RunState(status, str(newest["reason"]), job)
    started = newest["kind"] == "start"
    if job.phase == "running":
        return RunState("running" if started else "starting", "", job)
    if job.phase != "ended":
        return RunState(job.phase, job.reason, job)
    if cancelled or job.slurm_state == "CANCELLED":
        return RunState("cancelled", f"before it {'could save' if started else 'began'}", job)
    submitted = job.slurm_state != NO_JOB.slurm_state
    return RunState("died", f"its job ended as {job.slurm_state}" if submitted else job.reason, job)


def total_steps(run: RunDirectory) -> int | None:
    """Returns the steps of the whole run; None if its experiment cannot be read or its data are gone."""
    try:
        return total_steps_of(run.experiment())
    except UserError:
        return None


def total_steps_of(experiment: Experiment) -> int | None:
    """Returns the steps of the whole training on its share of the data; None if the data are gone.

    Only the store's manifest is read: the rest may be gone.
    """
    data = experiment.data
    try:
        manifest = json_file.load(store_path(data.name, data.image_size) / MANIFEST, _MANIFEST)
    except UserError:
        return None
    if manifest is None or data.train not in manifest.splits:
        return None
    images = manifest.splits[data.train].images
    return experiment.total_steps(chosen_count(images, data.fraction))


def best_epoch(lines: list[Line]) -> Line | None:
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return min(epochs, key=lambda line: line["metrics"]["val/loss"], default=None)


def newest_step(lines: list[Line]) -> int:
    return max((line["step"] for line in lines if line["kind"] in ("step", "end")), default=0)
