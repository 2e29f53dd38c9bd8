"""Runs in words: one line each, or everything about one."""

import textwrap
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files.paths import printable
from cvae.preflight.checks import Network, size
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from slurm import job_state
from slurm.cluster_file import count
from slurm.commands import JobState
from slurm.job_state import Submission
from workflows.jobs.follow import epoch_line, failure_facts, mlflow_fact
from workflows.jobs.run_state import (
    NO_JOB,
    RunState,
    best_epoch,
    is_settled,
    judge,
    last_submission,
    marks_of,
    newest_step,
    run_state,
    submissions,
    total_steps_of,
)
from workflows.listing.attempt_summary import story
from workflows.terminal.formatting import (
    Fact,
    aligned,
    clock,
    duration,
    shown,
    table,
)

T = TypeVar("T")
_NOTICES_SHOWN = 10


class _Listed(NamedTuple):
    """What a row of the list is made of: each file of the run, read once."""

    run: RunDirectory
    experiment: Experiment
    last: Submission | None
    lines: list[Line]
    marks: list[Line]
    settled: bool


def list_text(runs: list[RunDirectory]) -> str:
    """Returns a table of runs, and below it a line for each that cannot be read."""
    listed, odd = [], []
    for run in runs:
        try:
            listed.append(_read(run))
        except (UserError, OSError) as error:
            odd.append(f"{printable(run.name)}  unreadable: {_reason(run, error)}")
    open_ones = [one.last for one in listed if not one.settled and one.last is not None]
    jobs = iter(job_state.look_at_all(open_ones))
    rows = []
    unknown: dict[str, None] = {}
    for one in listed:
        job = NO_JOB if one.settled or one.last is None else next(jobs)
        if job.phase == "unknown":
            unknown.setdefault(printable(f"unknown: {job.reason}"))
        rows.append(_row(one, job))
    header = ["RUN", "STATUS", "STEP", "VAL LOSS", "WHERE", "AGE"]
    text = table(header, rows, right=["STEP", "VAL LOSS", "AGE"])
    return "\n".join([text, *unknown, *odd])


def _reason(run: RunDirectory, error: UserError | OSError) -> str:
    """On one line, with files as they are called in the run's folder."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}"
    return textwrap.shorten(printable(" ".join(text.split()).replace(f"{run.path}/", "")), 200)


def _read(run: RunDirectory) -> _Listed:
    """Raises UserError or OSError if a file of the run is damaged or cannot be read."""
    if run.name != printable(run.name):
        raise UserError("its name is not printable text in UTF-8; rename the folder")
    experiment, last = run.experiment(), last_submission(run)
    offset = last.journal_offset if last is not None else 0
    before = journal.read_outline(run.journal_file, 0, offset)
    since = journal.read_outline(run.journal_file, offset)
    marks = marks_of(since)
    settled = is_settled(run, marks, last)
    return _Listed(run, experiment, last, before + since, marks, settled)


def _row(one: _Listed, job: JobState) -> list[str]:
    best, last = best_epoch(one.lines), one.last
    cancelled = last is not None and last.cancelled is not None
    return [
        one.run.name,
        judge(one.marks, job, cancelled).status,
        _progress(one.lines, total_steps_of(one.experiment), "/"),
        f"{best['metrics']['val/loss']:.2f}" if best else "",
        printable(f"{last.cluster}, {count(last.world_size, 'rank')}") if last else "",
        duration(time.time() - one.run.created),
    ]


def show_text(run: RunDirectory) -> str:
    """Returns all that can be read of a run; what cannot is named."""
    odd: list[Fact] = []

    def readable(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (UserError, OSError) as error:
            odd.append(("unreadable", _reason(run, error)))
            return None

    lines = readable(lambda: journal.read_outline(run.journal_file)) or []
    entries = readable(lambda: submissions(run)) or []
    experiment = readable(run.experiment)
    unknown = RunState("unknown", "its files are damaged", NO_JOB)
    state = unknown if odd else readable(lambda: run_state(run)) or unknown
    facts: list[Fact] = [
        ("run", f"{printable(run.name)}, made {clock(run.created)}"),
        ("status", f"{state.status}: {state.reason}" if state.reason else state.status),
        *odd,
    ]
    if state.status in ("failed", "died"):
        facts += failure_facts(run)
    if experiment is not None:
        facts += _experiment(run, experiment)
    total = total_steps_of(experiment) if experiment is not None else None
    trained = duration(journal.training_seconds(lines))
    facts.append(("steps", f"{_progress(lines, total, ' of ')}, {trained} of training"))
    facts += [("submitted", _submission(entry)) for entry in entries]
    told = story(run, lines, state.job) if entries else []
    if told:
        facts.append(("tries", "\n".join(told)))
    if state.status in ("failed", "died", "stopped", "cancelled"):
        facts.append(("continue", f"python workflows/runs.py resume {printable(run.name)}"))
    facts += _preflight(lines) + _ran_on(lines) + _metrics(lines) + _checkpoints(run)
    notices = [f"{clock(x['time'])}: {x['message']}" for x in lines if x["kind"] == "notice"]
    if notices:
        facts.append(("notices", "\n".join(notices[-_NOTICES_SHOWN:])))
    facts += [
        ("pictures", shown(run.pictures)),
        ("logs", shown(run.logs)),
        ("MLflow", mlflow_fact(run, state)),
    ]
    return aligned(facts)


def _experiment(run: RunDirectory, experiment: Experiment) -> list[Fact]:
    model, training, data = experiment.model, experiment.training, experiment.data
    return [
        ("experiment", f"{experiment.name}, seed {experiment.seed}; {shown(run.experiment_file)}"),
        ("model", f"{model.backbone}, condition {model.condition}, latent_dim {model.latent_dim}"),
        ("data", f"{data.name} {data.image_size}×{data.image_size}"),
        ("training", f"batch {training.global_batch_size}, lr {experiment.optimizer.lr:g}"),
    ]


def _progress(lines: list[Line], total: int | None, of: str) -> str:
    return f"{newest_step(lines):,}" + (f"{of}{total:,}" if total else "")


def _submission(entry: Submission) -> str:
    cancelled = f"; cancelled {clock(entry.cancelled)}" if entry.cancelled else ""
    size = f"{count(entry.nodes, 'node')}, {count(entry.world_size, 'rank')}"
    return f"{clock(entry.time)}: {entry.where}, {size}{cancelled}"


def _preflight(lines: list[Line]) -> list[Fact]:
    """What the last start saw of its nodes. Its warnings are among the notices."""
    seen = [line for line in lines if line["kind"] == "preflight"]
    if not seen:
        return []
    last, hosts = seen[-1], seen[-1]["hosts"].values()
    disks = [host["free_disk"] for host in hosts if host.get("free_disk") is not None]
    clocks = [host["clock_offset_s"] for host in hosts]
    nodes = [f"{count(len(hosts), 'node')} in {last['seconds']:.1f} s"]
    if hosts:
        nodes.append(f"free memory {size(min(host['free_memory'] for host in hosts))}")
    if disks:
        nodes.append(f"free disk {size(min(disks))}")
    if len(clocks) > 1:
        nodes.append(f"clocks within {max(clocks) - min(clocks):.1f} s")
    text = ", ".join(nodes)
    if last.get("all_reduce") is not None:
        text += f"\nall-reduce: {Network.model_validate(last['all_reduce'])}"
    return [("preflight", text)]


def _ran_on(lines: list[Line]) -> list[Fact]:
    starts = [line for line in lines if line["kind"] == "start"]
    if not starts:
        return []
    start = starts[-1]
    hosts = ", ".join(dict.fromkeys(start.get("hosts") or ["unknown hosts"]))
    code = (start.get("commit") or "unknown")[:12] + (
        " with uncommitted changes" if start.get("uncommitted_changes") else ""
    )
    return [
        ("started", f"{count(len(starts), 'time')}, last from step {starts[-1]['step']:,}"),
        (
            "ranks",
            f"{start.get('world_size') or '?'} × {start.get('device') or 'unknown device'},"
            f" {start.get('precision') or 'unknown precision'}, on {hosts}",
        ),
        ("code", code),
    ]


def _metrics(lines: list[Line]) -> list[Fact]:
    facts: list[Fact] = []
    steps = [line for line in lines if line["kind"] == "step"]
    if steps:
        values = {name.removeprefix("train/"): x for name, x in steps[-1]["metrics"].items()}
        text = ", ".join(f"{name} {value:,.5g}" for name, value in values.items())
        facts.append(("train", f"step {steps[-1]['step']:,}: {text}"))
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if epochs:
        facts.append(("val", epoch_line(epochs[-1])))
        best = best_epoch(lines)
        if best is not epochs[-1] and best is not None:
            facts.append(("best", epoch_line(best)))
    return facts


def _checkpoints(run: RunDirectory) -> list[Fact]:
    names = sorted(path.name for path in run.checkpoints.glob("step-*"))
    link = run.checkpoints / "best"
    if not names:
        return []
    best = f"; best {link.readlink().name}" if link.is_symlink() else ""
    return [("checkpoints", ", ".join(names) + best)]
