"""Describes a run for the terminal: its failure, its evaluations, its code and its place in MLflow."""

from cvae.errors import UserError
from cvae.files import paths
from cvae.files.paths import printable
from cvae.redaction import without_password
from cvae.run import code_snapshot
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from cvae.tracking.mlflow_state import behind
from slurm.cluster_file import count
from slurm.failure_diagnosis import first_failure
from workflows.jobs.run_state import RunState, last_submission, submissions
from workflows.terminal.formatting import Fact, shown


def failure_facts(run: RunDirectory, state: RunState) -> list[Fact]:
    """Returns, for a run that failed, which rank of the last submission failed first and the end of its log."""
    if state.status not in ("failed", "died"):
        return []
    last = last_submission(run)
    failure = first_failure(run.logs, last.job_id) if last else None
    if failure is None:
        return [("logs", shown(run.logs))]
    return [
        ("cause" if failure.end.rank is None else "went first", str(failure)),
        (f"log {failure.rank}", "\n".join([shown(failure.log), *failure.tail])),
    ]


def epoch_text(line: Line) -> str:
    """ "epoch 3, step 1,407: val loss 241.21 (recon_loss 215.90, kl 25.31)"."""
    values = {name.removeprefix("val/"): value for name, value in line["metrics"].items()}
    parts = [f"{name} {values[name]:.2f}" for name in ("recon_loss", "kl") if name in values]
    place = f"epoch {line['epoch']:.4g}, step {line['step']:,}"
    return f"{place}: val loss {values['loss']:.2f} ({', '.join(parts)})"


def code_text(run: RunDirectory) -> str:
    """Returns which code the last submission runs, and how to see its difference from that of the first."""
    ids = [entry.code for entry in submissions(run) if entry.code is not None]
    known = [id for id in ids if (run.path / "code" / id).is_dir()]
    if not known:
        return "unknown"
    first, last = (code_snapshot.read(run.path / "code" / id) for id in (known[0], known[-1]))
    if first.source == last.source:
        return f"{last}, as the run began"
    return f"{last}; the run began with {first}:\ndiff -r {shown(first.root)} {shown(last.root)}"


def next_facts(run: RunDirectory, state: RunState) -> list[Fact]:
    """Returns where pictures and metrics are, and the commands that generate images, resume the run or sync it."""
    facts: list[Fact] = []
    if any(run.pictures.glob("*.png")):
        facts.append(("pictures", shown(run.pictures)))
    if any(run.checkpoints.glob("step-*")):
        facts.append(("generate", f"python workflows/generate.py {printable(run.name)}"))
    if state.status in ("stopped", "cancelled", "failed", "died"):
        facts.append(("continue", f"python workflows/runs.py resume {printable(run.name)}"))
    mlflow = open_mlflow()
    try:
        missing = behind(run.path)
        # As long as the job lives, its mirror is at work and always a little behind.
        if missing and not state.job.alive:
            sync = f"python workflows/runs.py sync {printable(run.name)}"
            mlflow += f"\n{count(missing, 'line')} behind: {sync}"
    except (UserError, OSError) as error:
        mlflow += f"\n{printable(str(error))}"
    return [*facts, ("MLflow", mlflow)]


def open_mlflow() -> str:
    """Returns the address of the MLflow server, or the command that starts MLflow's UI on the local store."""
    uri = without_password(paths.tracking_uri())
    return uri if uri.startswith("http") else f"make mlflow   ({uri})"
