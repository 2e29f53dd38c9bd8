"""Decoding and encoding by the ranks of a job, while the command that prepares waits for them."""

import time
from collections.abc import Callable
from pathlib import Path

from cvae import paths
from cvae.code_snapshot import Snapshot
from cvae.data.building import locked, progress_bar
from cvae.data.filling import Plan
from cvae.errors import UserError
from slurm import queue
from slurm.client import DONE, JobState
from slurm.cluster import Place, Placement, TimeLimit
from slurm.evidence import first_failure
from slurm.executors import Job
from slurm.queue import Submission
from workflows.plan import locate
from workflows.submission import END_PATIENCE_S, job_environment, submitted
from workflows.text import aligned, shown

FILL = "cvae.data.filling:fill_parts"
_POLL_S = {"slurm": 4.0, "local": 0.5}
# Network file systems show what other hosts have written late.
_LAG_S = 90.0


def filler(
    asked: Placement, cluster_name: str | None, minutes: int | None = None
) -> Callable[[Plan], None]:
    """What prepare_coco calls to have a plan filled by that many ranks.

    Raises UserError where there is no such cluster, or where it is smaller than what is asked.
    """
    place, placement, facts = locate(asked, cluster_name, False, TimeLimit(minutes))

    def fill(plan: Plan) -> None:
        if plan.left():
            print(aligned(facts), flush=True)
            _run(plan, place, placement, asked.world_size)

    return fill


def end_leftover(store: Path) -> None:
    """Ends the job of a preparation of this store that was itself killed: nobody waits for it.

    Raises UserError where the job cannot be reached, or where another process is preparing the store.
    """
    file = _submission_file(store / ".preparing")
    if not file.exists():
        return
    with locked(store):
        if file.exists():
            submission = Submission.model_validate_json(file.read_text())
            if queue.look(submission).phase != "ended":
                print(f"ending {submission.where}, which an earlier preparation left", flush=True)
                queue.end(submission, END_PATIENCE_S, lambda _: None)
            file.unlink()


def _submission_file(folder: Path) -> Path:
    return folder / "job" / "submission.json"


def _run(plan: Plan, place: Place, placement: Placement, gpus: int) -> None:
    """Raises UserError where SLURM refuses the job, and where the job ends before all is done."""
    plan.write()
    logs = _submission_file(plan.folder).parent
    logs.mkdir(exist_ok=True)
    job = Job("prepare", logs, FILL, (plan.folder,), job_environment(Snapshot().write()))

    def note(submission: Submission) -> None:
        paths.write_atomically(_submission_file(plan.folder), submission.model_dump_json())

    try:
        kept = "its finished parts are kept"
        with submitted(job, place, placement, gpus, kept, note) as submission:
            state = _wait(plan, submission)
    finally:
        _submission_file(plan.folder).unlink(missing_ok=True)
    deadline = time.monotonic() + _LAG_S
    while (left := plan.left()) and state.word in DONE and time.monotonic() < deadline:
        time.sleep(_POLL_S[submission.executor])
    if left:
        failure = first_failure(logs, submission.job_id)
        why = str(failure) if failure else f"it ended as {state.word}"
        raise UserError(
            f"{submission.where} has left {left} of {plan.total} parts undone: {why}; finished parts "
            f"are kept: start again to go on; log: {shown(failure.log if failure else logs)}"
        )


def _wait(plan: Plan, submission: Submission) -> JobState:
    """Shows the finished parts until the job has ended; the last that was heard of it."""
    bar = progress_bar(plan.total, "part", "queued", plan.total - plan.left())
    with bar:
        while True:
            # Asked before counting: whatever a job finished before it ended is then counted.
            state = queue.look(submission)
            other = {
                "queued": "queued",
                "unknown": f"cannot query the job ({state.reason}); retrying",
            }
            bar.set_description(other.get(state.phase, "decode and encode"), refresh=False)
            bar.update(plan.total - plan.left() - bar.n)
            if state.phase == "ended":
                return state
            time.sleep(_POLL_S[submission.executor])
