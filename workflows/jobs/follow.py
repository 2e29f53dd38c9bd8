"""Follows a run from the queue to its end."""

import textwrap
import time
from contextlib import suppress

from cvae.errors import UserError
from cvae.files.paths import printable
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from cvae.tracking.mlflow_mirror import last_log_line
from cvae.tracking.mlflow_state import behind
from slurm import attempts, job_state
from slurm.attempts import Cause
from slurm.cluster_file import count
from slurm.commands import JobState
from workflows.jobs.run_facts import epoch_text, failure_facts, next_facts
from workflows.jobs.run_state import (
    RunState,
    best_epoch,
    judge,
    newest_step,
    run_state,
    submissions,
    total_steps,
)
from workflows.terminal.formatting import Fact, aligned, clock, duration
from workflows.terminal.live_display import Display

FINISHED, FAILED, BAD_INPUT, STOPPED, DETACHED = 0, 1, 2, 3, 130
_EXIT_STATUS = {"finished": FINISHED, "stopped": STOPPED, "cancelled": STOPPED}
_JOURNAL_POLL_S = 0.3
_QUEUE_POLL_S = {"slurm": 4.0, "local": 1.0}
# How long to wait for the job's end: a finished job lives on until MLflow's mirror has caught up or given up,
# and a failed one may restart.
_PATIENCE_S = {"finished": 45.0, "failed": 180.0}


def follow_or_detach(run: RunDirectory, detach: bool) -> int:
    """Ends a command that has submitted a run; see follow() for the exit status. detach: 0, without waiting."""
    if warning := job_state.requeue_warning(submissions(run)[-1]):
        print(f"warning: {warning}")
    if not detach:
        return follow(run)
    print(f"submitted {run.name}; follow it: python workflows/runs.py logs {run.name} --follow")
    return 0


def follow(run: RunDirectory) -> int:
    """Displays the run's last submission until it ends. Returns the exit status of the command.

    0: finished. 1: failed or died. 2: failed because data or nodes are unsuitable. 3: stopped or cancelled.
    130: Ctrl-C; the run continues.
    """
    display = Display()
    try:
        state = Follower(run, display).watch()
    except KeyboardInterrupt:
        display.clear()
        commands = {"follow": "logs {} --follow", "look": "show {}", "stop": "cancel {}"}
        command = "python workflows/runs.py"
        facts = [(name, f"{command} {text.format(run.name)}") for name, text in commands.items()]
        print(f"\ndetached: {run.name} continues.\n{aligned(facts)}")
        return DETACHED
    display.clear()
    print(_ending(run, state))
    made = attempts.read(run.logs, submissions(run)[-1].job_id)
    if state.status == "failed" and made and made[-1].cause == Cause.BAD_INPUT:
        return BAD_INPUT
    return _EXIT_STATUS.get(state.status, FAILED)


class Follower:
    """Reads the journal and queries the job, and displays what is new."""

    def __init__(self, run: RunDirectory, display: Display):
        self.run, self.display = run, display
        self.total = total_steps(run)
        self.log_every, self.compiles = 1, False
        with suppress(UserError):
            training = run.experiment().training
            self.log_every, self.compiles = training.log_every, training.compile
        self.submission = submissions(run)[-1]
        self.offset = self.submission.journal_offset
        self.marks: list[Line] = []
        self.job = JobState("queued", "PENDING")
        self.queried_at = -float("inf")
        self.is_unknown = False
        self.checked = False  # by the preflight of this start
        self.step: int | None = None

    def watch(self) -> RunState:
        """Returns the state of the run after its job has ended, or a while after the run itself has."""
        ended_at: float | None = None
        while True:
            # The job is queried before the journal is read, so that what it wrote before its end is read.
            self._query_job()
            lines, self.offset = journal.read(self.run.journal_file, self.offset)
            for line in lines:
                self.show_line(line)
            state = judge(self.marks, self.job, cancelled=False)
            is_over = state.status in _PATIENCE_S
            ended_at = (ended_at or time.monotonic()) if is_over else None
            if ended_at is not None:
                overdue = time.monotonic() > ended_at + _PATIENCE_S[state.status]
                if overdue or not self.job.alive:
                    return run_state(self.run)
                waiting = f"{state.status}; waiting for the job to end"
                self.display.status(waiting, self._mirroring())
            elif self.job.phase == "ended":
                return run_state(self.run)
            elif state.status == "running" and self.step is not None:
                self.display.tick()
            else:
                self.show_waiting(state)
            time.sleep(_JOURNAL_POLL_S)

    def _query_job(self) -> None:
        if time.monotonic() - self.queried_at < _QUEUE_POLL_S[self.submission.executor]:
            return
        job = job_state.look(self.submission)
        self.queried_at = time.monotonic()
        if job.phase != "unknown":
            self.job = job
        elif not self.is_unknown:
            self.display.message(f"cannot query {self.submission.where}: {job.reason}; retrying")
        self.is_unknown = job.phase == "unknown"

    def _mirroring(self) -> str:
        """Returns what MLflow still lacks; the job ends when MLflow has all, or half a minute later."""
        with suppress(UserError, OSError):
            if missing := behind(self.run.path):
                doing = textwrap.shorten(printable(last_log_line(self.run.path)), 100)
                return f", and for MLflow: {count(missing, 'journal line')} to go ({doing})"
        return ""

    def show_waiting(self, state: RunState) -> None:
        """Displays what the run waits for before its first step."""
        self.display.pause()
        where, detail = self.submission.where, ""
        if state.status == "stopping":
            text = "stopped; waiting for the job to end"
        elif state.status == "running":
            compiling = "; the model is being compiled" if self.compiles else ""
            text = f"waiting for the first step{compiling}"
        elif state.status == "starting":
            node = "" if self.job.reason in where else f", on {self.job.reason}"
            building = "; the nodes are checked, the model is being built" if self.checked else ""
            text = f"starting: {where}{node}{building}"
        else:
            reason = self.job.reason
            text = f"queued: {where}" + (
                f", waits for: {reason}" if reason not in ("", "None") else ""
            )
            if self.job.start is not None:
                detail = f", expected to start {clock(self.job.start)}"
        self.display.status(text, detail)

    def show_line(self, line: Line) -> None:
        """Displays a line of the journal."""
        match line["kind"]:
            case "preflight":
                self.checked = True
            case "start":
                self.marks.append(line)
                self.checked, self.step = False, None
                parts = [line.get("device"), line.get("precision"), *(line.get("hosts") or [])]
                on = ", ".join(dict.fromkeys(filter(None, parts)))
                ranks = count(line.get("world_size") or 1, "rank")
                self.display.message(f"training from step {line['step']:,} on {ranks} ({on})")
            case "end":
                self.marks.append(line)
                self.display.pause()
                if line["status"] not in ("finished", "stopped"):
                    text = f"{line['status']} at step {line['step']:,}: {line['reason']}"
                    self.display.message(text)
            case "step":
                self._show_step(line["step"], line["metrics"])
            case "epoch":
                self.display.message(epoch_text(line))
            case "notice":
                self.display.message(f"note: {line['message']}")

    def _show_step(self, step: int, metrics: dict[str, float]) -> None:
        notes = {}
        if "train/loss" in metrics:
            notes["loss"] = f"{metrics['train/loss']:.2f}"
        if "train/images_per_second" in metrics:
            notes["images/s"] = f"{metrics['train/images_per_second']:,.0f}"
        self.step = step
        if step == 1 and self.log_every > 1:
            notes["next point"] = f"step {min(self.log_every, self.total or self.log_every)}"
        self.display.progress(step, self.total, notes)


def _ending(run: RunDirectory, state: RunState) -> str:
    """Returns how the run ended, and what to look at or do next."""
    lines = journal.read_outline(run.journal_file)
    total = total_steps(run)
    where = f"{run.name} at step {newest_step(lines):,}" + (f" of {total:,}" if total else "")
    if state.status == "finished":
        text = f"{where} in {duration(journal.training_seconds(lines))}"
    else:
        text = f"{where}: {textwrap.shorten(state.reason, 300)}"
    facts: list[Fact] = [(state.status, text)]
    facts += failure_facts(run, state)
    if (best := best_epoch(lines)) is not None:
        loss = best["metrics"]["val/loss"]
        facts.append(("val loss", f"{loss:.2f} at step {best['step']:,} (best)"))
    return aligned([*facts, *next_facts(run, state)])
