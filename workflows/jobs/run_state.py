"""How a run stands: what its journal says, and what has become of its last job."""

from typing import NamedTuple

from pydantic import BaseModel, TypeAdapter

from cvae.config.experiment import Experiment
from cvae.data.draws import chosen_count
from cvae.data.store import MANIFEST, store_path
from cvae.errors import UserError
from cvae.files import json_file
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from slurm import attempts, job_state
from slurm.commands import JobState
from slurm.job_state import Submission

_SUBMISSIONS = TypeAdapter(list[Submission])
NO_JOB = JobState("ended", "NONE", "it was never submitted")


class RunState(NamedTuple):
    status: str
    """queued | starting | running | stopping | finished | failed | stopped | cancelled | died | unknown."""
    reason: str
    job: JobState


def submissions(run: RunDirectory) -> list[Submission]:
    """Oldest first. Raises UserError if launch.json is damaged."""
    return job_state.found_in(run.path, json_file.load(run.launch_file, _SUBMISSIONS) or [])


def last_submission(run: RunDirectory) -> Submission | None:
    return next(reversed(submissions(run)), None)


def run_state(run: RunDirectory) -> RunState:
    last = last_submission(run)
    # Asked before reading: what a job wrote before it ended is then read.
    job = NO_JOB if last is None else job_state.look(last)
    return judge(_marks(run, last), job, last is not None and last.cancelled is not None)


def is_settled(run: RunDirectory, marks: list[Line], last: Submission | None) -> bool:
    """Returns whether the journal alone says how the run stands, so that the queue need not be asked."""
    status = marks[-1].get("status") if marks else None
    told = attempts.read(run.logs, last.job_id) if last else []
    return status == "finished" or (status == "failed" and not (told and told[-1].restarts))


def marks_of(lines: list[Line]) -> list[Line]:
    """Returns the start and end lines."""
    return [line for line in lines if line["kind"] in ("start", "end")]


def _marks(run: RunDirectory, last: Submission | None) -> list[Line]:
    """The start and end lines since the last submission."""
    return marks_of(journal.read_outline(run.journal_file, last.journal_offset if last else 0))


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
    if cancelled or job.slurm_state == "CANCELLED":
        return RunState("cancelled", "before it could save" if started else "before it began", job)
    return RunState(
        "died",
        job.reason
        if job.slurm_state == NO_JOB.slurm_state
        else f"its job ended as {job.slurm_state}",
        job,
    )


class _Images(BaseModel):
    images: int


class _Manifest(BaseModel):
    """What a store's manifest says that is of use here; it is not opened, as the data may be gone."""

    splits: dict[str, _Images]


_MANIFEST = TypeAdapter(_Manifest)


def total_steps(run: RunDirectory) -> int | None:
    """Returns the steps of a whole run; None if its experiment cannot be read or its data are gone."""
    try:
        return total_steps_of(run.experiment())
    except UserError:
        return None


def total_steps_of(experiment: Experiment) -> int | None:
    """Returns the steps of the whole training on its share of the data; None if the data are gone."""
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
