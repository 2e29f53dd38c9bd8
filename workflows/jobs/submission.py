"""Handing a run to SLURM or to this machine: once at a time, and written down."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files import paths
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
from workflows.terminal.formatting import shown

TRAIN = "cvae.training.train:train"
# A job that nobody waits for any more: what it has done is on the disk, it has nothing to save.
END_PATIENCE_S = 5.0
AFTER = "cvae.training.record_failure:note_bad_end"
AFTER_IN_SWEEP = "cvae.training.record_failure:journal_bad_end"


def job_of(run: RunDirectory, code: Path, part_of_sweep: bool = False) -> Job:
    """code: the snapshot that it is to run. part_of_sweep: it ends with this process, which tells MLflow."""
    after = AFTER_IN_SWEEP if part_of_sweep else AFTER
    supervision = Supervision(str(run.checkpoints / "step-*"), after, str(run.path))
    environment = {**training_environment(), **job_environment(code)}
    if part_of_sweep and submissions(run):
        # A host that was lost may still hold the run's lock for a while.
        environment["CVAE_RESTARTED"] = "1"
    job = Job(run.name, run.logs, TRAIN, (run.path, not part_of_sweep), environment, supervision)
    return job._replace(ends_with=os.getpid()) if part_of_sweep else job


def job_environment(code: Path) -> dict[str, str]:
    """What else the environment holds, sbatch and submitit hand on by themselves."""
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    search = os.pathsep.join(dict.fromkeys([str(code), *filter(None, inherited)]))
    return {"CVAE_HOME": str(paths.home()), "CVAE_CODE": str(code), "PYTHONPATH": search}


def training_environment() -> dict[str, str]:
    """Has glibc keep the memory that a step frees: the next one needs as much.

    Given back, it comes back page by page, each zeroed by the kernel: 5 % of a step on a CPU. What the user's
    environment says goes before.
    """
    # Not MALLOC_MMAP_THRESHOLD_: before glibc 2.35 it is at most 32 MB, and a greater one is ignored.
    wanted = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    return {name: value for name, value in wanted.items() if name not in os.environ}


def submit_new(
    name: str, experiment: Experiment, place: Place, placement: Placement, gpus: int
) -> RunDirectory:
    """Makes the run's folder and submits it; where that fails, nothing is left.

    Raises UserError where the name is taken, the folder cannot be written or SLURM refuses the job.
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
    """part_of_sweep: see job_of. force: even if nobody can say whether the last job still runs.

    Raises UserError if the run is queued, running or finished, or if that is not known.
    """
    with locked(run.path):
        state = run_state(run)
        if state.job.alive:
            last = submissions(run)[-1]
            raise UserError(
                f"{run.name} is {state.status} ({last.where}); see"
                f" `python workflows/runs.py logs {run.name} --follow`"
            )
        if state.status == "finished":
            raise UserError(
                f"{run.name} is finished; to repeat it: python workflows/launch.py {run.experiment_file}"
            )
        # Of a trial, Ray knows that it has ended, on whatever host that was.
        if state.job.phase == "unknown" and not (force or part_of_sweep):
            raise UserError(unknown(run.name, submissions(run)[-1], state.job))
        offset = journal.read(run.journal_file)[1]
        code = CodeSnapshot().write()
        code_snapshot.link(run.path, code)
        with interrupts_wait():
            submission = executors.submit(job_of(run, code, part_of_sweep), place, placement, gpus)
            more: dict[str, Any] = {"journal_offset": offset, "code": code.name}
            more["folder"] = os.path.realpath(run.path)
            if part_of_sweep:
                # Nobody typed this process's command; the file repeats the trial alone.
                more["command"] = f"workflows/launch.py runs/{run.name}/{run.experiment_file.name}"
            submission = submission.model_copy(update=more)
            try:
                _write(run, [*submissions(run), submission])
            except OSError:
                # A job that nobody could follow or cancel must not run.
                job_state.end(submission, 0, lambda _: None)
                raise
    return submission


def unknown(name: str, last: Submission, job: JobState) -> str:
    """Why a run or a sweep is not simply submitted once more."""
    return (
        f"{name}: whether {last.where} still runs is not known: {job.reason};"
        " if it has certainly ended, --force goes on all the same"
    )


def code_fact(run: RunDirectory) -> str:
    """What the last submission runs, and whether that is what the run began with."""
    ids = [entry.code for entry in submissions(run) if entry.code is not None]
    known = [id for id in ids if (run.path / "code" / id).is_dir()]
    if not known:
        return "unknown"
    first, last = (code_snapshot.read(run.path / "code" / id) for id in (known[0], known[-1]))
    if first.source == last.source:
        return f"{last}, as the run began"
    return f"{last}; the run began with {first}:\ndiff -r {shown(first.root)} {shown(last.root)}"


def note_cancelled(run: RunDirectory, when: float) -> None:
    with locked(run.path):
        *earlier, last = submissions(run)
        attempts.mark_cancelled(run.logs, last.job_id)
        _write(run, [*earlier, last.model_copy(update={"cancelled": when})])


def _write(run: RunDirectory, entries: list[Submission]) -> None:
    text = json.dumps([entry.model_dump() for entry in entries], indent=1)
    paths.write_atomically(run.launch_file, text + "\n")


def locked(folder: Path) -> AbstractContextManager[None]:
    """Raises UserError if another launch, resume or cancel of the run or sweep in this folder is at work."""
    refusal = f"{folder.name} is being launched, resumed or cancelled by another process right now"
    return file_lock(folder / "launch.lock", refusal=refusal)


@contextmanager
def submitted(
    job: Job,
    place: Place,
    placement: Placement,
    gpus: int,
    kept: str = "",
    note: Callable[[Submission], object] = lambda submission: None,
) -> Iterator[Submission]:
    """A job that somebody waits for: it does not outlive the context where that ends badly, as by Ctrl-C.

    gpus: what was asked for. kept: what of its work stays then. note: writes down that it was submitted.
    Raises UserError where SLURM refuses the job.
    """
    with interrupts_wait():
        submission = executors.submit(job, place, placement, gpus)
        note(submission)
    try:
        yield submission
    except BaseException:
        print("; ".join(filter(None, [f"\ncancelling {submission.where}", kept])), flush=True)
        job_state.end(submission, END_PATIENCE_S, lambda _: None)
        raise


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C comes after the block: a job that is submitted is also written down."""
    pending: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: pending.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        raise KeyboardInterrupt
