"""A sweep on the screen: a live table with a bar over all epochs, or lines where there is no terminal."""

import json
import shlex
import sys
import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cvae.config import yaml_model
from cvae.config.experiment import load_experiment
from cvae.files.paths import PROJECT_ROOT
from cvae.run import journal
from slurm import attempts, job_state
from slurm.cluster_file import count
from slurm.commands import JobState
from workflows.jobs.follow import DETACHED, FAILED, FINISHED, STOPPED
from workflows.jobs.run_facts import open_mlflow
from workflows.jobs.run_state import newest_step, total_steps
from workflows.sweeps import mirror
from workflows.sweeps.directory import SweepDirectory, Trial, best_trial, run_of, shown
from workflows.sweeps.sweep_file import Sweep, with_values
from workflows.terminal.formatting import aligned, duration

# What a sweep may cut short, and what is trained in full afterwards.
_LENGTH = ("training.epochs", "training.max_steps", "training.eval_every", "data.fraction")
_POLL_S = 1.0
_ASK_S = 3.0
_LINE_EVERY_S = 15.0
_STYLES = {"running": "cyan", "finished": "green", "failed": "red", "stopped early": "yellow"}


def follow(sweep: SweepDirectory) -> int:
    """Shows the sweep until its job ends. Returns the exit status for the command.

    0: every trial has ended, one at least well. 1: the sweep failed. 3: stopped. 130: Ctrl-C; it goes on.
    """
    screen = _Screen(sweep)
    try:
        job = _watch(sweep, screen)
    except KeyboardInterrupt:
        screen.close()
        print(f"\ndetached: {sweep.name} goes on.")
        come_back = f"python workflows/sweep.py --resume {sweep.name}"
        stop = f"python workflows/sweep.py --cancel {sweep.name}"
        print(aligned([("come back", come_back), ("stop it", stop)]))
        return DETACHED
    screen.close()
    trials = sweep.trials()
    Console().print(table(sweep.sweep(), trials))
    print(ending(sweep, trials, job))
    if is_finished(sweep):
        return FAILED if all(trial.status == "failed" for trial in trials) else FINISHED
    return STOPPED if _was_stopped(sweep, job) else FAILED


def _watch(sweep: SweepDirectory, screen: "_Screen") -> JobState:
    asked, job = -float("inf"), JobState("queued", "PENDING")
    while True:
        if time.monotonic() - asked > _ASK_S:
            # Asked before reading: what the job wrote before it ended is then shown.
            asked, job = time.monotonic(), job_state.look(sweep.submissions()[-1])
        screen.show(sweep.trials(), job)
        if job.phase == "ended":
            return job
        time.sleep(_POLL_S)


class _Screen:
    def __init__(self, sweep: SweepDirectory):
        self.sweep, self.settings = sweep, sweep.sweep()
        self.experiment = sweep.experiment()
        self.began = time.monotonic()
        self.done_at_first: float | None = None
        self.live = Live(console=Console(), refresh_per_second=2) if sys.stdout.isatty() else None
        if self.live is not None:
            self.live.start()
        self.told: dict[int, str] = {}
        self.told_at = 0.0

    def close(self) -> None:
        if self.live is not None:
            self.live.update(Text(""))
            self.live.stop()

    def show(self, trials: list[Trial], job: JobState) -> None:
        share = self._share(trials)
        if self.done_at_first is None:
            self.done_at_first = share
        line = self._line(trials, share, job)
        if self.live is not None:
            bar = ProgressBar(total=1.0, completed=share, width=50)
            rows = max(4, self.live.console.height - 6)
            self.live.update(Group(table(self.settings, trials, rows), bar, Text(line)))
            return
        for trial in trials:
            if trial.ended and self.told.get(trial.index) != trial.status:
                self.told[trial.index] = trial.status
                print(_told(trial, self.settings), flush=True)
        if time.monotonic() - self.told_at > _LINE_EVERY_S:
            self.told_at = time.monotonic()
            print(line, flush=True)

    def _share(self, trials: list[Trial]) -> float:
        """Of all epochs that may be trained; a trial that has ended is done with its own."""
        epochs = self.experiment.training.epochs
        done = [1.0 if trial.ended else min(1.0, trial.epoch / epochs) for trial in trials]
        return sum(done) / max(self.settings.n_trials, len(trials))

    def _line(self, trials: list[Trial], share: float, job: JobState) -> str:
        if not trials:
            return f"{job.slurm_state.lower()}: {self.sweep.submissions()[-1].where}; Ray starts"
        ended = sum(trial.ended for trial in trials)
        parts = [f"{ended} of {self.settings.n_trials} trials, {share:.0%} of the epochs"]
        best = best_trial(trials, self.settings.mode)
        if best is not None:
            parts.append(f"best {self.settings.metric} {best.best:.2f} ({changed(best)})")
        gained = share - (self.done_at_first or 0.0)
        if gained > 0.02 and share < 1:
            left = (time.monotonic() - self.began) / gained * (1 - share)
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)


def table(settings: Sweep, trials: list[Trial], rows: int | None = None) -> Table:
    """One row a trial: changed keys, epoch, step, metric, state.

    Where there are more than `rows`: those that run, then the best.
    """
    keys = list(settings.space)
    grid = Table(box=None, pad_edge=False)
    for heading in ("trial", *(key.rpartition(".")[2] for key in keys)):
        grid.add_column(heading, justify="right")
    for heading in ("epoch", "step", settings.metric):
        grid.add_column(heading, justify="right")
    grid.add_column("state")
    best = best_trial(trials, settings.mode)
    left_out = 0
    if rows is not None and len(trials) > rows:
        sign = 1 if settings.mode == "min" else -1
        running = [trial for trial in trials if trial.status == "running"]
        others = [trial for trial in trials if trial.status != "running"]
        others.sort(key=lambda x: float("inf") if x.best is None else sign * x.best)
        left_out = len(trials) - rows + 1
        trials = [*running, *others][: rows - 1]
    for trial in trials:
        value = trial.metrics.get(settings.metric)
        row = [str(trial.index), *(shown(trial.values.get(key)) for key in keys)]
        row += [f"{trial.epoch:.4g}", _step(trial), "" if value is None else f"{value:.2f}"]
        state = Text(f"{trial.status}: {trial.reason}" if trial.reason else trial.status)
        state.truncate(60, overflow="ellipsis")
        state.stylize(_STYLES.get(trial.status, ""))
        grid.add_row(*map(Text, row), state, style="bold" if trial is best else "")
    if left_out:
        grid.add_row(*["…"] * (len(keys) + 4), f"and {left_out} more")
    return grid


def _step(trial: Trial) -> str:
    if trial.status != "running":
        return f"{trial.step:,}"
    run = run_of(trial)
    if not run.experiment_file.exists():
        return ""
    total = total_steps(run)
    return f"{newest_step(journal.read_outline(run.journal_file)):,}/{total or '?'}"


def changed(trial: Trial) -> str:
    return ", ".join(f"{key}={shown(value)}" for key, value in trial.values.items())


def _told(trial: Trial, settings: Sweep) -> str:
    value = f", {settings.metric} {trial.best:.2f}" if trial.best is not None else ""
    reason = f": {trial.reason}" if trial.reason else ""
    return f"trial {trial.index} ({changed(trial)}) {trial.status}{reason}{value}"


def ending(sweep: SweepDirectory, trials: list[Trial], job: JobState) -> str:
    """How the sweep ended, its best trial, and what to do now."""
    settings = sweep.sweep()
    kinds = ("finished", "stopped early", "failed", "running", "queued")
    counts = {kind: sum(trial.status == kind for trial in trials) for kind in kinds}
    told = ", ".join(f"{number} {kind}" for kind, number in counts.items() if number)
    facts = [
        ("sweep", f"{sweep.name}: {count(len(trials), 'trial')}; {told or job.slurm_state.lower()}")
    ]
    failed = [trial for trial in trials if trial.status == "failed"]
    if failed:
        lines = [f"{changed(trial)}: {trial.reason}" for trial in failed[:10]]
        facts.append(("failed", "\n".join(lines)))
    best = best_trial(trials, settings.mode)
    if best is not None:
        facts.append(("best", f"{best.run}, {settings.metric} {best.best:.2f}"))
        facts.append(("in full", full_command(sweep, best)))
        report = f"python analysis/report.py --sweep {sweep.name} --out reports/{sweep.name}"
        facts.append(("report", report))
    if not is_finished(sweep):
        earlier = attempts.read(sweep.logs, sweep.submissions()[-1].job_id)
        if earlier and earlier[-1].end is not None:
            facts.append(("why", earlier[-1].end.reason))
        facts.append(("logs", str(sweep.logs)))
        facts.append(("continue", f"python workflows/sweep.py --resume {sweep.name}"))
    mlflow = f"{open_mlflow()}\nits runs stand below the parent {sweep.name}"
    if late := mirror.behind(sweep):
        mlflow += f"\n{count(late, 'run')} behind: python workflows/runs.py sync {sweep.name}"
    facts.append(("MLflow", mlflow))
    return aligned(facts)


def full_command(sweep: SweepDirectory, trial: Trial) -> str:
    """What trains a trial's system as the experiment's file means it: on all data, to the end."""
    settings = sweep.sweep()
    meant = yaml_model.flatten(load_experiment(PROJECT_ROOT / settings.experiment).model_dump())
    searched = yaml_model.flatten(with_values(sweep.experiment(), trial.values).model_dump())
    values = [
        shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}")
        for key, value in searched.items()
        if meant[key] != value and key not in _LENGTH
    ]
    return " ".join(["python workflows/launch.py", shlex.quote(settings.experiment), *values])


def is_finished(sweep: SweepDirectory) -> bool:
    """Whether every trial has ended that was to be; a budget may have ended before some began."""
    trials = sweep.trials()
    told = attempts.read(sweep.logs, sweep.submissions()[-1].job_id)
    complete = len(trials) >= sweep.sweep().n_trials or bool(told and told[-1].cause == "finished")
    return bool(trials) and complete and all(trial.ended for trial in trials)


def _was_stopped(sweep: SweepDirectory, job: JobState) -> bool:
    told = attempts.read(sweep.logs, sweep.submissions()[-1].job_id)
    return job.slurm_state == "CANCELLED" or bool(
        told and told[-1].cause in ("cancelled", "signal")
    )
