"""Decoding and encoding by the ranks of a job, while the command that prepares waits for them."""

import time
from collections.abc import Callable
from pathlib import Path

from cvae.errors import UserError
from cvae.files import paths
from cvae.preparation.part_workers import Plan
from cvae.preparation.store_writer import locked
from cvae.progress import progress_bar
from cvae.run.code_snapshot import CodeSnapshot
from slurm import job_state
from slurm.cluster_file import Place, Placement, TimeLimit
from slurm.commands import DONE, JobState
from slurm.executors import Job
from slurm.failure_diagnosis import first_failure
from slurm.job_state import Submission
from workflows.jobs.plan import locate
from workflows.jobs.submission import END_PATIENCE_S, job_environment, submitted
from workflows.terminal.formatting import aligned, shown

FILL = "cvae.preparation.part_workers:fill_parts"
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
            if job_state.look(submission).phase != "ended":
                print(f"ending {submission.where}, which an earlier preparation left", flush=True)
                job_state.end(submission, END_PATIENCE_S, lambda _: None)
            file.unlink()


def _submission_file(folder: Path) -> Path:
    return folder / "job" / "submission.json"


def _run(plan: Plan, place: Place, placement: Placement, gpus: int) -> None:
    """Raises UserError where SLURM refuses the job, and where the job ends before all is done."""
    plan.write()
    logs = _submission_file(plan.folder).parent
    logs.mkdir(exist_ok=True)
    job = Job("prepare", logs, FILL, (plan.folder,), job_environment(CodeSnapshot().write()))

    def note(submission: Submission) -> None:
        paths.write_atomically(_submission_file(plan.folder), submission.model_dump_json())

    try:
        kept = "its finished parts are kept"
        with submitted(job, place, placement, gpus, kept, note) as submission:
            state = _wait(plan, submission)
    finally:
        _submission_file(plan.folder).unlink(missing_ok=True)
    deadline = time.monotonic() + _LAG_S
    while (left := plan.left()) and state.slurm_state in DONE and time.monotonic() < deadline:
        time.sleep(_POLL_S[submission.executor])
    if left:
        failure = first_failure(logs, submission.job_id)
        why = str(failure) if failure else f"it ended as {state.slurm_state}"
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
            state = job_state.look(submission)
            other = {
                "queued": "queued",
                "unknown": f"cannot query the job ({state.reason}); retrying",
            }
            bar.set_description(other.get(state.phase, "decode and encode"), refresh=False)
            bar.update(plan.total - plan.left() - bar.n)
            if state.phase == "ended":
                return state
            time.sleep(_POLL_S[submission.executor])
