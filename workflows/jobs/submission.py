"""Submits runs to SLURM or to this machine, one submission of a run at a time, and records them."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files import json_file, paths
from cvae.files.file_lock import file_lock
from cvae.run import code_snapshot, journal
from cvae.run.code_snapshot import CodeSnapshot
from cvae.run.directory import RunDirectory
from slurm import attempts, executors, job_state
from slurm.cluster_file import Place, Placement
from slurm.commands import JobState
from slurm.executors import Job
from slurm.job_state import Submission
from slurm.supervision import Supervision
from workflows.jobs.run_state import run_state, submissions

TRAIN = "cvae.training.train:train"
# For a job that nobody waits for any more: its work is on the disk, and it has nothing to save.
END_PATIENCE_S = 5.0
AFTER = "cvae.training.record_failure:note_bad_end"
AFTER_IN_SWEEP = "cvae.training.record_failure:journal_bad_end"


def job_of(run: RunDirectory, code: Path, part_of_sweep: bool = False) -> Job:
    """Returns the training job of a run. code: the snapshot to run.

    part_of_sweep: the job ends with this process, which also sends the metrics to MLflow.
    """
    after = AFTER_IN_SWEEP if part_of_sweep else AFTER
    supervision = Supervision(str(run.checkpoints / "step-*"), after, str(run.path))
    environment = {**training_environment(), **job_environment(code)}
    if part_of_sweep and submissions(run):
        # A host that was lost may hold the run's lock for a while.
        environment["CVAE_RESTARTED"] = "1"
    job = Job(run.name, run.logs, TRAIN, (run.path, not part_of_sweep), environment, supervision)
    return job._replace(ends_with=os.getpid()) if part_of_sweep else job


def job_environment(code: Path) -> dict[str, str]:
    """Returns the variables that make a job use the snapshot `code`; sbatch forwards the rest."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = os.pathsep.join(dict.fromkeys([str(code), *filter(None, inherited)]))
    return {"CVAE_HOME": str(paths.home()), "CVAE_CODE": str(code), "PYTHONPATH": search}


def training_environment() -> dict[str, str]:
    """Returns variables that make glibc keep freed memory for the next step; the user's own take precedence.

    Memory that was returned to the kernel comes back page by page, each zeroed: 5 % of a step on a CPU.
    """
    # Not MALLOC_MMAP_THRESHOLD_: before glibc 2.35 it is at most 32 MB, and a greater value is ignored.
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def submit_new(
    name: str, experiment: Experiment, place: Place, placement: Placement, gpus: int
) -> RunDirectory:
    """Creates the run's folder and submits the run; if that fails, nothing is left.

    gpus: the requested total. Raises UserError if the name is taken, the folder cannot be written or SLURM
    refuses the job.
    """
    run = RunDirectory.create(name, experiment)
    try:
        submit(run, place, placement, gpus)
    except BaseException as error:
        if not submissions(run):
            shutil.rmtree(run.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{run.path}: cannot be written: {error.strerror}") from None
        raise
    return run


def submit(
    run: RunDirectory,
    place: Place,
    placement: Placement,
    gpus: int,
    part_of_sweep: bool = False,
    force: bool = False,
) -> Submission:
    """Submits a run and records it in launch.json. part_of_sweep: see job_of().

    force: even if the state of the last job is unknown. Raises UserError if that is unknown, or if the run is
    queued, running or finished.
    """
    with locked(run.path):
        state, earlier = run_state(run), submissions(run)
        if state.job.alive:
            look = f"python workflows/runs.py logs {run.name} --follow"
            raise UserError(f"{run.name} is {state.status} ({earlier[-1].where}); see `{look}`")
        if state.status == "finished":
            repeat = f"python workflows/launch.py {run.experiment_file}"
            raise UserError(f"{run.name} is finished; to repeat it: {repeat}")
        # Ray knows that a trial has ended, on whatever host it ran.
        if state.job.phase == "unknown" and not (force or part_of_sweep):
            raise UserError(unknown(run.name, earlier[-1], state.job))
        offset = journal.read(run.journal_file)[1]
        code = CodeSnapshot().write()
        code_snapshot.link(run.path, code)
        with interrupts_wait():
            submission = executors.submit(job_of(run, code, part_of_sweep), place, placement, gpus)
            folder = os.path.realpath(run.path)
            more = {"journal_offset": offset, "code": code.name, "folder": folder}
            if part_of_sweep:
                # Nobody typed this process's command; the file repeats the trial alone.
                more["command"] = f"workflows/launch.py runs/{run.name}/{run.experiment_file.name}"
            submission = submission.model_copy(update=more)
            try:
                _write(run, [*earlier, submission])
            except OSError:
                # A job that nobody can follow or cancel must not run.
                job_state.end(submission, 0, lambda _: None)
                raise
    return submission


def unknown(name: str, last: Submission, job: JobState) -> str:
    """Returns why a run or a sweep is not submitted again if the state of its last job is unknown."""
    return (
        f"{name}: whether {last.where} still runs is not known: {job.reason};"
        " if you are certain that it has ended, add --force"
    )


def note_cancelled(run: RunDirectory, when: float) -> None:
    """Records that the user cancels the run, so that its job does not restart."""
    with locked(run.path):
        *earlier, last = submissions(run)
        attempts.mark_cancelled(run.logs, last.job_id)
        _write(run, [*earlier, last.model_copy(update={"cancelled": when})])


def _write(run: RunDirectory, entries: list[Submission]) -> None:
    json_file.save(run.launch_file, [entry.model_dump() for entry in entries])


def locked(folder: Path) -> AbstractContextManager[None]:
    """Raises UserError while another process launches, resumes or cancels the run or sweep in this folder."""
    refusal = f"{folder.name} is being launched, resumed or cancelled by another process right now"
    return file_lock(folder / "launch.lock", refusal=refusal)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block, so that a job that was submitted is also recorded."""
    pending: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: pending.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt
