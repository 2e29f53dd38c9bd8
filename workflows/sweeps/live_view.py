"""Shows a sweep while it runs: a live table with a bar on a terminal, lines elsewhere."""

import json
import shlex
import sys
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cvae.config import yaml_model
from cvae.config.experiment import load_experiment
from cvae.files.paths import PROJECT_ROOT
from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import attempts, job_state
from slurm.attempts import Attempt, Cause
from slurm.cluster_file import count
from slurm.commands import JobState
from workflows.jobs.follow import DETACHED, FAILED, FINISHED, STOPPED
from workflows.jobs.run_facts import open_mlflow
from workflows.jobs.run_state import newest_step, total_steps
from workflows.sweeps import mirror
from workflows.sweeps.directory import SweepDirectory, Trial, best_trial, shown
from workflows.sweeps.sweep_file import Sweep, with_values
from workflows.terminal.formatting import Fact, aligned, duration

# Keys that a sweep may set to shorten trials; the best trial's full training does without them.
_LENGTH = ("training.epochs", "training.max_steps", "training.eval_every", "data.fraction")
_POLL_S = 1.0
_JOB_POLL_S = 3.0
_LINE_EVERY_S = 15.0
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "stopped early": "yellow"}


def follow(sweep: SweepDirectory) -> int:
    """Shows the sweep until its job ends. Returns the exit status of the command.

    0: every trial has ended, at least one of them well. 1: the sweep failed. 3: it was stopped. 130:
    Ctrl-C, after which the sweep goes on.
    """
    screen = _Screen(sweep)
    try:
        job = screen.watch()
    except KeyboardInterrupt:
        print(f"\ndetached: {sweep.name} goes on.")
        come_back = f"python workflows/sweep.py --resume {sweep.name}"
        stop = f"python workflows/sweep.py --cancel {sweep.name}"
        print(aligned([("come back", come_back), ("stop it", stop)]))
        return DETACHED
    trials = sweep.trials()
    Console().print(table(sweep.sweep(), trials))
    print(ending(sweep, trials, job))
    if is_finished(sweep):
        return FAILED if all(trial.status == "failed" for trial in trials) else FINISHED
    last = _last_attempt(sweep)
    stopped = last is not None and last.cause in (Cause.CANCELLED, Cause.SIGNAL)
    return STOPPED if stopped or job.slurm_state == "CANCELLED" else FAILED


class _Screen:
    def __init__(self, sweep: SweepDirectory):
        self.sweep, self.settings = sweep, sweep.sweep()
        self.epochs = sweep.experiment().training.epochs
        self.began = time.monotonic()
        self.initial_share: float | None = None
        self.live = Live(console=Console(), refresh_per_second=2, transient=True)
        self.reported: dict[int, str] = {}
        self.line_at = 0.0

    def watch(self) -> JobState:
        """Shows the sweep until its job ends, and returns the job's state then."""
        asked_at = -float("inf")
        with self.live if sys.stdout.isatty() else nullcontext():
            while True:
                if time.monotonic() - asked_at > _JOB_POLL_S:
                    # Before the trials are read, so that none of the job's last updates is missed.
                    job = job_state.look(self.sweep.submissions()[-1])
                    asked_at = time.monotonic()
                self.show(self.sweep.trials(), job)
                if job.phase == "ended":
                    return job
                time.sleep(_POLL_S)

    def show(self, trials: list[Trial], job: JobState) -> None:
        # Of all epochs that may be trained; a trial that has ended needs no more.
        done = [1.0 if trial.ended else min(1.0, trial.epoch / self.epochs) for trial in trials]
        share = sum(done) / max(self.settings.n_trials, len(trials))
        if self.initial_share is None:
            self.initial_share = share
        line = self._line(trials, share, share - self.initial_share, job)
        if self.live.is_started:
            bar = ProgressBar(total=1.0, completed=share, width=50)
            rows = max(4, self.live.console.height - 6)
            self.live.update(Group(table(self.settings, trials, rows), bar, Text(line)))
            return
        for trial in trials:
            if trial.ended and self.reported.get(trial.index) != trial.status:
                self.reported[trial.index] = trial.status
                text = f"trial {trial.index} ({trial.changes()}) {_state(trial)}"
                if trial.best is not None:
                    text += f", {self.settings.metric} {trial.best:.2f}"
                print(text, flush=True)
        if time.monotonic() - self.line_at > _LINE_EVERY_S:
            self.line_at = time.monotonic()
            print(line, flush=True)

    def _line(self, trials: list[Trial], share: float, gained: float, job: JobState) -> str:
        if not trials:
            return f"{job.slurm_state.lower()}: {self.sweep.submissions()[-1].where}; Ray starts"
        ended = sum(trial.ended for trial in trials)
        parts = [f"{ended} of {self.settings.n_trials} trials, {share:.0%} of the epochs"]
        best = best_trial(trials, self.settings.mode)
        if best is not None:
            parts.append(f"best {self.settings.metric} {best.best:.2f} ({best.changes()})")
        if gained > 0.02 and share < 1:
            left = (time.monotonic() - self.began) / gained * (1 - share)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def table(settings: Sweep, trials: list[Trial], rows: int | None = None) -> Table:
    """Returns a table of the trials with changed keys, epoch, step, metric and state.

    rows: the most to show: running trials first, then the best ones.
    """
    best = best_trial(trials, settings.mode)
    omitted = 0
    if rows is not None and len(trials) > rows:
        sign = 1 if settings.mode == "min" else -1
        omitted = len(trials) - rows + 1
        running_first = sorted(
            trials,
            key=lambda trial: (
                (False, 0.0)
                if trial.status == "running"
                else (True, float("inf") if trial.best is None else sign * trial.best)
            ),
        )
        trials = running_first[: rows - 1]
    keys = list(settings.space)
    grid = Table(box=None, pad_edge=False)
    short_keys = (key.rpartition(".")[2] for key in keys)
    for heading in ("trial", *short_keys, "epoch", "step", settings.metric):
        grid.add_column(heading, justify="right")
    grid.add_column("state")
    for trial in trials:
        value = trial.metrics.get(settings.metric)
        row = [str(trial.index), *(shown(trial.values.get(key)) for key in keys)]
        row += [f"{trial.epoch:.4g}", _step(trial), "" if value is None else f"{value:.2f}"]
        state = Text(_state(trial), _STYLES.get(trial.status, ""))
        state.truncate(60, overflow="ellipsis")
        grid.add_row(*map(Text, row), state, style="bold" if trial is best else "")
    if omitted:
        grid.add_row(*["…"] * (len(keys) + 4), f"and {omitted} more")
    return grid


def _state(trial: Trial) -> str:
    return f"{trial.status}: {trial.reason}" if trial.reason else trial.status


def _step(trial: Trial) -> str:
    if trial.status != "running":
        return f"{trial.step:,}"
    run = trial.run_directory
    if not run.experiment_file.exists():
        return ""
    step = newest_step(journal.read_outline(run.journal_file))
    return f"{step:,}/{_total_steps(run.path) or '?'}"


@cache
def _total_steps(run: Path) -> int | None:
    return total_steps(RunDirectory(run))


def ending(sweep: SweepDirectory, trials: list[Trial], job: JobState) -> str:
    """Returns how the sweep ended, its best trial, and the commands that may come next."""
    settings = sweep.sweep()
    statuses = ("finished", "stopped early", "failed", "running", "queued")
    numbers = {status: sum(trial.status == status for trial in trials) for status in statuses}
    counts = ", ".join(f"{number} {status}" for status, number in numbers.items() if number)
    summary = f"{sweep.name}: {count(len(trials), 'trial')}; {counts or job.slurm_state.lower()}"
    facts: list[Fact] = [("sweep", summary)]
    if failed := [trial for trial in trials if trial.status == "failed"]:
        lines = [f"{trial.changes()}: {trial.reason}" for trial in failed[:10]]
        facts.append(("failed", "\n".join(lines)))
    best = best_trial(trials, settings.mode)
    if best is not None:
        report = f"python analysis/report.py --sweep {sweep.name} --out reports/{sweep.name}"
        facts += [
            ("best", f"{best.run}, {settings.metric} {best.best:.2f}"),
            ("in full", full_command(sweep, best)),
            ("report", report),
        ]
    if not is_finished(sweep):
        last = _last_attempt(sweep)
        if last is not None and last.end is not None:
            facts.append(("why", last.end.reason))
        facts.append(("logs", str(sweep.logs)))
        facts.append(("continue", f"python workflows/sweep.py --resume {sweep.name}"))
    mlflow = f"{open_mlflow()}\nits runs are below the parent run {sweep.name}"
    if late := mirror.behind(sweep):
        mlflow += f"\n{count(late, 'run')} behind: python workflows/runs.py sync {sweep.name}"
    return aligned([*facts, ("MLflow", mlflow)])


def full_command(sweep: SweepDirectory, trial: Trial) -> str:
    """Returns the command that trains a trial's model for as long as the experiment file says."""
    settings = sweep.sweep()
    base = yaml_model.flatten(load_experiment(PROJECT_ROOT / settings.experiment).model_dump())
    searched = yaml_model.flatten(with_values(sweep.experiment(), trial.values).model_dump())
    values = [
        shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        for key, value in searched.items()
        if base[key] != value and key not in _LENGTH
    ]
    return " ".join(["python workflows/launch.py", shlex.quote(settings.experiment), *values])


def is_finished(sweep: SweepDirectory) -> bool:
    """Returns whether all trials have ended; the budget may have ended before some began."""
    trials, last = sweep.trials(), _last_attempt(sweep)
    complete = len(trials) >= sweep.sweep().n_trials or (
        last is not None and last.cause is Cause.FINISHED
    )
    return bool(trials) and complete and all(trial.ended for trial in trials)


def _last_attempt(sweep: SweepDirectory) -> Attempt | None:
    return next(reversed(attempts.read(sweep.logs, sweep.submissions()[-1].job_id)), None)
