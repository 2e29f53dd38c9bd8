"""Decodes and encodes with the ranks of a job, while the preparing command waits for them."""

from collections.abc import Callable
from pathlib import Path

from cvae.errors import UserError
from cvae.files import paths
from cvae.preparation.part_workers import PartPlan
from cvae.preparation.store_writer import locked
from cvae.progress import progress_bar
from cvae.run.code_snapshot import CodeSnapshot
from slurm import job_state
from slurm.cluster_file import Placement, TimeLimit
from slurm.commands import JobState
from slurm.executors import Job
from slurm.job_state import Submission
from workflows.jobs.plan import locate
from workflows.jobs.submission import END_PATIENCE_S, job_environment
from workflows.jobs.waiting import run_and_wait, waiting_text
from workflows.terminal.formatting import aligned

FILL = "cvae.preparation.part_workers:fill_parts"


def filler(
    requested: Placement, cluster_name: str | None, minutes: int | None = None
) -> Callable[[PartPlan], None]:
    """Returns a function for prepare_coco that has the ranks of a job fill a plan's parts.

    Raises UserError if there is no such cluster or if it is smaller than requested; the function raises
    UserError if SLURM refuses the job, and if the job ends before all parts are finished.
    """
    place, placement, facts = locate(requested, cluster_name, False, TimeLimit(minutes))

    def fill(plan: PartPlan) -> None:
        if not plan.unfinished():
            return
        print(aligned(facts), flush=True)
        plan.write()
        file = _submission_file(plan.folder)
        file.parent.mkdir(exist_ok=True)
        job = Job(
            "prepare", file.parent, FILL, (plan.folder,), job_environment(CodeSnapshot().write())
        )

        def write(submission: Submission) -> None:
            paths.write_atomically(file, submission.model_dump_json())

        def show(submission: Submission, state: JobState) -> None:
            text = waiting_text(submission, state, "decode and encode")
            bar.set_description(text, refresh=False)
            bar.update(plan.total - plan.unfinished() - bar.n)

        try:
            with progress_bar(plan.total, "part", "queued", plan.total - plan.unfinished()) as bar:
                ended = run_and_wait(
                    job,
                    place,
                    placement,
                    requested.world_size,
                    show,
                    is_complete=lambda: not plan.unfinished(),
                    kept="its finished parts are kept",
                    on_submit=write,
                )
        finally:
            file.unlink(missing_ok=True)
        if unfinished := plan.unfinished():
            raise UserError(
                f"{ended.submission.where} has left {unfinished} of {plan.total} parts undone: "
                f"{ended.cause}; finished parts are kept: start again to go on; log: {ended.log}"
            )

    return fill


def end_leftover(store: Path) -> None:
    """Ends the job that a killed preparation of this store has left, for which nobody waits.

    Raises UserError if the job cannot be reached, or if another process prepares the store.
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
