"""Formats runs for the terminal: one line each, or everything about one."""

import textwrap
import time
from collections.abc import Callable
from typing import Any, TypeVar

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
from workflows.jobs.run_facts import epoch_text, failure_facts, next_facts
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
from workflows.listing.attempt_summary import attempt_lines
from workflows.terminal.formatting import Fact, aligned, clock, duration, shown, table

T = TypeVar("T")
_Row = tuple[Submission | None, Callable[[JobState], list[str]]]
"""The submission whose job has to be queried, if any, and what makes the row's cells of the job's state."""
_NOTICES_SHOWN = 10


def list_text(runs: list[RunDirectory]) -> str:
    """Returns a table of runs, and below it a line for each that cannot be read."""
    if not runs:
        return "no runs yet; python workflows/launch.py starts one"
    rows: list[_Row] = []
    notes = []
    for run in runs:
        try:
            rows.append(_read(run))
        except (UserError, OSError) as error:
            notes.append(f"{printable(run.name)}  unreadable: {_reason(run, error)}")
    # One query for all jobs.
    states = iter(job_state.look_at_all([submission for submission, _ in rows if submission]))
    jobs = [next(states) if submission else NO_JOB for submission, _ in rows]
    cells = [cells_of(job) for (_, cells_of), job in zip(rows, jobs, strict=True)]
    unknown = [printable(f"unknown: {job.reason}") for job in jobs if job.phase == "unknown"]
    header = ["RUN", "STATUS", "STEP", "VAL LOSS", "WHERE", "AGE"]
    text = table(header, cells, right=["STEP", "VAL LOSS", "AGE"])
    return "\n".join([text, *dict.fromkeys(unknown), *notes])


def _reason(run: RunDirectory, error: UserError | OSError) -> str:
    """Returns one line in which files are named relative to the run's folder."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return textwrap.shorten(printable(" ".join(text.split()).replace(f"{run.path}/", "")), 200)


def _read(run: RunDirectory) -> _Row:
    """Reads each file of the run once. Raises UserError or OSError if one is damaged or cannot be read."""
    if run.name != printable(run.name):
        raise UserError("its name is not printable text in UTF-8; rename the folder")
    experiment, last = run.experiment(), last_submission(run)
    offset = last.journal_offset if last is not None else 0
    since = journal.read_outline(run.journal_file, offset)
    lines = journal.read_outline(run.journal_file, 0, offset) + since
    marks, best = marks_of(since), best_epoch(lines)

    def cells(job: JobState) -> list[str]:
        return [
            run.name,
            judge(marks, job, last is not None and last.cancelled is not None).status,
            _progress(lines, experiment, "/"),
            f"{best['metrics']['val/loss']:.2f}" if best else "",
            printable(f"{last.cluster}, {count(last.world_size, 'rank')}") if last else "",
            duration(time.time() - run.created),
        ]

    return None if is_settled(run, marks, last) else last, cells


def _progress(lines: list[Line], experiment: Experiment | None, of: str) -> str:
    total = total_steps_of(experiment) if experiment is not None else None
    return f"{newest_step(lines):,}" + (f"{of}{total:,}" if total else "")


def show_text(run: RunDirectory) -> str:
    """Returns everything that can be read of a run, and names what cannot be read."""
    damage: list[Fact] = []

    def readable(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (UserError, OSError) as error:
            damage.append(("unreadable", _reason(run, error)))
            return None

    lines = readable(lambda: journal.read_outline(run.journal_file)) or []
    entries = readable(lambda: submissions(run)) or []
    experiment = readable(run.experiment)
    unknown = RunState("unknown", "its files are damaged", NO_JOB)
    state = unknown if damage else readable(lambda: run_state(run)) or unknown
    facts: list[Fact] = [
        ("run", f"{printable(run.name)}, made {clock(run.created)}"),
        ("status", f"{state.status}: {state.reason}" if state.reason else state.status),
        *damage,
    ]
    facts += failure_facts(run, state)
    if experiment is not None:
        facts += _experiment(run, experiment)
    trained = duration(journal.training_seconds(lines))
    facts.append(("steps", f"{_progress(lines, experiment, ' of ')}, {trained} of training"))
    facts += [("submitted", _submission(entry)) for entry in entries]
    if entries and (attempts := attempt_lines(run, lines, state.job)):
        facts.append(("attempts", "\n".join(attempts)))
    facts += _journal_facts(lines)
    if names := sorted(path.name for path in run.checkpoints.glob("step-*")):
        link = run.checkpoints / "best"
        best = f"; best {link.readlink().name}" if link.is_symlink() else ""
        facts.append(("checkpoints", ", ".join(names) + best))
    if notices := [f"{clock(x['time'])}: {x['message']}" for x in lines if x["kind"] == "notice"]:
        facts.append(("notices", "\n".join(notices[-_NOTICES_SHOWN:])))
    return aligned([*facts, ("logs", shown(run.logs)), *next_facts(run, state)])


def _experiment(run: RunDirectory, experiment: Experiment) -> list[Fact]:
    model, training, data = experiment.model, experiment.training, experiment.data
    return [
        ("experiment", f"{experiment.name}, seed {experiment.seed}; {shown(run.experiment_file)}"),
        ("model", f"{model.backbone}, condition {model.condition}, latent_dim {model.latent_dim}"),
        ("data", f"{data.name} {data.image_size}×{data.image_size}"),
        ("training", f"batch {training.global_batch_size}, lr {experiment.optimizer.lr:g}"),
    ]


def _submission(entry: Submission) -> str:
    cancelled = f"; cancelled {clock(entry.cancelled)}" if entry.cancelled else ""
    ranks = f"{count(entry.nodes, 'node')}, {count(entry.world_size, 'rank')}"
    return f"{clock(entry.time)}: {entry.where}, {ranks}{cancelled}"


def _journal_facts(lines: list[Line]) -> list[Fact]:
    """Returns what the journal says of the run's last nodes, code and metrics."""
    by_kind: dict[str, list[Line]] = {}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    facts: list[Fact] = []
    if "preflight" in by_kind:
        facts.append(("preflight", _preflight(by_kind["preflight"][-1])))
    if starts := by_kind.get("start"):
        facts += _ran_on(starts[-1], len(starts))
    if "step" in by_kind:
        newest = by_kind["step"][-1]
        values = {name.removeprefix("train/"): x for name, x in newest["metrics"].items()}
        text = ", ".join(f"{name} {value:,.5g}" for name, value in values.items())
        facts.append(("train", f"step {newest['step']:,}: {text}"))
    if epochs := by_kind.get("epoch"):
        facts.append(("val", epoch_text(epochs[-1])))
        best = best_epoch(epochs)
        if best is not None and best is not epochs[-1]:
            facts.append(("best", epoch_text(best)))
    return facts


def _preflight(line: Line) -> str:
    """Returns the state of the nodes before the last start; its warnings are among the notices."""
    hosts: list[dict[str, Any]] = list(line["hosts"].values())
    disks = [host["free_disk"] for host in hosts if host.get("free_disk") is not None]
    clocks = [host["clock_offset_s"] for host in hosts]
    parts = [f"{count(len(hosts), 'node')} in {line['seconds']:.1f} s"]
    if hosts:
        parts.append(f"free memory {size(min(host['free_memory'] for host in hosts))}")
    if disks:
        parts.append(f"free disk {size(min(disks))}")
    if len(clocks) > 1:
        parts.append(f"clocks within {max(clocks) - min(clocks):.1f} s")
    network = line.get("all_reduce")
    measured = f"\nall-reduce: {Network.model_validate(network)}" if network is not None else ""
    return ", ".join(parts) + measured


def _ran_on(start: Line, n_starts: int) -> list[Fact]:
    hosts = ", ".join(dict.fromkeys(start.get("hosts") or ["unknown hosts"]))
    changed = " with uncommitted changes" if start.get("uncommitted_changes") else ""
    device, precision = (start.get(key) or f"unknown {key}" for key in ("device", "precision"))
    return [
        ("started", f"{count(n_starts, 'time')}, last from step {start['step']:,}"),
        ("ranks", f"{start.get('world_size') or '?'} × {device}, {precision}, on {hosts}"),
        ("code", (start.get("commit") or "unknown")[:12] + changed),
    ]
