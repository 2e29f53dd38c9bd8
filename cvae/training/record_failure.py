"""Records the end of a run whose ranks could not do so themselves any more."""

from contextlib import closing
from pathlib import Path

from cvae.files.file_lock import Locked, file_lock
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.tracking import mlflow_mirror

MIRROR_PATIENCE_S = 30.0
"""The end of a run waits this long for MLflow and no longer: a later sync pushes the rest."""


def note_bad_end(run_path: str, reason: str, message: str, restarts: bool) -> None:
    """Writes the cause as the journal's last line; called by the supervisor when all ranks are gone.

    message: the exception alone, which rank 0 may have written already. restarts: the run goes on, and its next
    start pushes this line to MLflow.
    """
    if journal_bad_end(run_path, reason, message, restarts) and not restarts:
        mlflow_mirror.start_mirror(Path(run_path)).finish(MIRROR_PATIENCE_S)


def journal_bad_end(run_path: str, reason: str, message: str, restarts: bool) -> bool:
    """Does the same without MLflow, for a run that a sweep mirrors. Returns whether the journal was free."""
    run = RunDirectory(Path(run_path))
    try:
        with file_lock(run.path / "train.lock"):
            lines = journal.read(run.journal_file)[0]
            steps = [line["step"] for line in lines if line["kind"] in ("start", "step")]
            known = lines[-1]["reason"] if lines and lines[-1]["kind"] == "end" else None
            if known not in (reason, message):
                with closing(Journal(run.journal_file)) as writer:
                    step = max(steps, default=0)
                    writer.append("end", status="failed", step=step, reason=reason)
    except Locked:
        return False  # on a host out of reach rank 0 lives on, and writes
    return True
