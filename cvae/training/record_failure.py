"""What is written about a run whose ranks could not do so themselves any more."""

from pathlib import Path

from cvae.files.file_lock import Locked, file_lock
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.tracking import mlflow_mirror

_MIRROR_PATIENCE_S = 30.0


def note_bad_end(run_path: str, reason: str, message: str, restarts: bool) -> None:
    """Called where the run was looked after, when all ranks are gone: the journal's last line is the cause.

    message: the exception alone, which rank 0 may have written already. restarts: the run goes on, and
    its next start brings this line to MLflow.
    """
    if journal_bad_end(run_path, reason, message, restarts) and not restarts:
        mlflow_mirror.start_mirror(Path(run_path)).finish(_MIRROR_PATIENCE_S)


def journal_bad_end(run_path: str, reason: str, message: str, restarts: bool) -> bool:
    """The same without MLflow, for a run that a sweep tells MLflow about. Returns whether it was written."""
    run = RunDirectory(Path(run_path))
    try:
        with file_lock(run.path / "train.lock"):
            _journal_bad_end(run, reason, message)
    except Locked:
        return False  # on a host out of reach rank 0 lives on, and writes
    return True


def _journal_bad_end(run: RunDirectory, reason: str, message: str) -> None:
    lines = journal.read(run.journal_file)[0]
    last = lines[-1] if lines else {"kind": None}
    step = max((line["step"] for line in lines if line["kind"] in ("start", "step")), default=0)
    if last["kind"] != "end" or last["reason"] not in (reason, message):
        writer = Journal(run.journal_file)
        try:
            writer.append("end", status="failed", step=step, reason=reason)
        finally:
            writer.close()
