"""Following a run from the queue to its end."""

import textwrap
import time
from contextlib import suppress
from typing import Any

from cvae.errors import UserError
from cvae.files import paths
from cvae.files.paths import printable
from cvae.redaction import without_password
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.tracking.mlflow_mirror import behind, newest_word
from slurm import attempts, job_state
from slurm.cluster_file import count
from slurm.commands import JobState
from slurm.failure_diagnosis import first_failure
from slurm.job_state import Submission
from workflows.jobs.run_state import (
    RunState,
    best_epoch,
    judge,
    newest_step,
    run_state,
    submissions,
    total_steps,
    total_steps_of,
)
from workflows.terminal.formatting import Fact, aligned, clock, duration, shown
from workflows.terminal.live_display import Display

FINISHED, FAILED, BAD_INPUT, STOPPED, DETACHED = 0, 1, 2, 3, 130
_JOURNAL_POLL_S = 0.3
_QUEUE_POLL_S = {"slurm": 4.0, "local": 1.0}
# A finished job lives on until MLflow's mirror has caught up, or has given up.
_AFTERMATH_S = 45.0
# One that failed may be tried again.
_RESTART_S = 180.0


def follow(run: RunDirectory) -> int:
    """Shows the run's last submission until it ends. Returns the exit status for the command.

    0: finished. 1: failed, or died. 2: failed, as data or nodes are not as they must be. 3: stopped or cancelled.
    130: Ctrl-C; the run goes on.
    """
    display = Display()
    try:
        state = _Follower(run, display).watch()
    except KeyboardInterrupt:
        display.clear()
        print(
            f"\ndetached: {run.name} goes on.\n"
            + aligned(
                [
                    ("come back", f"python workflows/runs.py logs {run.name} --follow"),
                    ("look", f"python workflows/runs.py show {run.name}"),
                    ("stop it", f"python workflows/runs.py cancel {run.name}"),
                ]
            )
        )
        return DETACHED
    display.clear()
    print(ending(run, state))
    told = attempts.read(run.logs, submissions(run)[-1].job_id)
    if state.status == "failed" and told and told[-1].cause == "bad input":
        return BAD_INPUT
    return {"finished": FINISHED, "stopped": STOPPED, "cancelled": STOPPED}.get(
        state.status, FAILED
    )


class _Follower:
    def __init__(self, run: RunDirectory, display: Display):
        self.run, self.display = run, display
        self.total: int | None = None
        self.log_every, self.compiles = 1, False
        with suppress(UserError):
            experiment = run.experiment()
            self.total = total_steps_of(experiment)
            self.log_every = experiment.training.log_every
            self.compiles = experiment.training.compile
        self.submission: Submission = submissions(run)[-1]
        self.offset = self.submission.journal_offset
        self.marks: list[dict[str, Any]] = []
        self.job = JobState("queued", "PENDING")
        self.asked_at = -float("inf")
        self.blind = False
        self.checked = False  # by the preflight of this start
        self.step: int | None = None

    def watch(self) -> RunState:
        ended_at: float | None = None
        while True:
            # Asked before reading: whatever a job wrote before it ended is then read below.
            self._ask()
            for line in self._new_lines():
                self._show(line)
            state = judge(self.marks, self.job, cancelled=False)
            if state.status in ("finished", "failed"):
                ended_at = ended_at or time.monotonic()
                patience = _AFTERMATH_S if state.status == "finished" else _RESTART_S
                if not self.job.alive or time.monotonic() > ended_at + patience:
                    return run_state(self.run)
                self.display.status(
                    f"{state.status}; waiting for the job to end", self._mirroring()
                )
                time.sleep(_JOURNAL_POLL_S)
                continue
            ended_at = None
            if self.job.phase == "ended":
                return run_state(self.run)
            if state.status != "running" or self.step is None:
                self._wait(state)
            else:
                self.display.tick()
            time.sleep(_JOURNAL_POLL_S)

    def _mirroring(self) -> str:
        """What MLflow still lacks; the job ends when it has all, or half a minute later."""
        with suppress(UserError, OSError):
            if missing := behind(self.run.path):
                doing = textwrap.shorten(printable(newest_word(self.run.path)), 100)
                return f", and for MLflow: {count(missing, 'journal line')} to go ({doing})"
        return ""

    def _ask(self) -> None:
        if time.monotonic() - self.asked_at < _QUEUE_POLL_S[self.submission.executor]:
            return
        job = job_state.look(self.submission)
        self.asked_at = time.monotonic()
        if job.phase != "unknown":
            self.job, self.blind = job, False
        elif not self.blind:
            self.blind = True
            self.display.message(f"cannot see the job: {job.reason}; trying on")

    def _new_lines(self) -> list[dict[str, Any]]:
        lines, self.offset = journal.read(self.run.journal_file, self.offset)
        return lines

    def _wait(self, state: RunState) -> None:
        self.display.pause()
        where = self.submission.where
        if state.status == "stopping":
            self.display.status("stopped; waiting for the job to end")
            return
        if state.status == "running":
            compiling = "; the model is being compiled" if self.compiles else ""
            self.display.status(f"the first step is on its way{compiling}")
            return
        if state.status == "starting":
            node = self.job.reason
            phase = "; the nodes are checked, the model is being built" if self.checked else ""
            self.display.status(
                f"starting: {where}" + ("" if node in where else f", on {node}") + phase
            )
            return
        reason = f", waits for: {self.job.reason}" if self.job.reason not in ("", "None") else ""
        start = ""
        if self.job.start is not None:
            start = f", expected to start {clock(self.job.start)}"
        self.display.status(f"queued: {where}{reason}", start)

    def _show(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "preflight":
            self.checked = True
        elif kind == "start":
            self.marks.append(line)
            self.checked, self.step = False, None
            on = [
                line.get("device"),
                line.get("precision"),
                *dict.fromkeys(line.get("hosts") or []),
            ]
            ranks = count(line.get("world_size") or 1, "rank")
            self.display.message(
                f"training from step {line['step']:,} on {ranks} ({', '.join(filter(None, on))})"
            )
        elif kind == "end":
            self.marks.append(line)
            self.display.pause()
            if line["status"] not in ("finished", "stopped"):
                self.display.message(f"{line['status']} at step {line['step']:,}: {line['reason']}")
        elif kind == "step":
            metrics = line["metrics"]
            notes = {}
            if "train/loss" in metrics:
                notes["loss"] = f"{metrics['train/loss']:.2f}"
            if "train/images_per_second" in metrics:
                notes["images/s"] = f"{metrics['train/images_per_second']:,.0f}"
            self.step = line["step"]
            if self.step == 1 and self.log_every > 1:
                notes["next point"] = f"step {min(self.log_every, self.total or self.log_every)}"
            self.display.progress(self.step, self.total, notes)
        elif kind == "epoch":
            self.display.message(epoch_line(line))
        elif kind == "notice":
            self.display.message(f"note: {line['message']}")


def epoch_line(line: dict[str, Any]) -> str:
    """ "epoch 3, step 1,407: val loss 241.21 (recon_loss 215.90, kl 25.31)"."""
    values = {name.removeprefix("val/"): value for name, value in line["metrics"].items()}
    parts = ", ".join(
        f"{name} {values[name]:.2f}" for name in ("recon_loss", "kl") if name in values
    )
    return (
        f"epoch {line['epoch']:.4g}, step {line['step']:,}: val loss {values['loss']:.2f} ({parts})"
    )


def ending(run: RunDirectory, state: RunState) -> str:
    """How it ended, and what to do now."""
    lines = journal.read_outline(run.journal_file)
    facts: list[Fact] = [(state.status, _how_it_ended(run, state, lines))]
    if state.status in ("failed", "died"):
        facts += failure_facts(run)
    best = best_epoch(lines)
    if best is not None:
        facts.append(
            ("val loss", f"{best['metrics']['val/loss']:.2f} at step {best['step']:,} (best)")
        )
    if any(run.pictures.glob("*.png")):
        facts.append(("pictures", shown(run.pictures)))
    if any(run.checkpoints.glob("step-*")):
        facts.append(("generate", f"python workflows/generate.py {run.name}"))
    if state.status in ("stopped", "cancelled", "failed", "died"):
        facts.append(("continue", f"python workflows/runs.py resume {run.name}"))
    facts.append(("MLflow", mlflow_fact(run, state)))
    return aligned(facts)


def _how_it_ended(run: RunDirectory, state: RunState, lines: list[dict[str, Any]]) -> str:
    total = total_steps(run)
    at = f"at step {newest_step(lines):,}" + (f" of {total:,}" if total else "")
    if state.status == "finished":
        return f"{run.name} {at} in {duration(journal.training_seconds(lines))}"
    return f"{run.name} {at}: {textwrap.shorten(state.reason, 300)}"


def failure_facts(run: RunDirectory) -> list[Fact]:
    """Which rank went first and its last words, where the logs tell."""
    failure = first_failure(run.logs, submissions(run)[-1].job_id) if submissions(run) else None
    if failure is None:
        return [("logs", shown(run.logs))]
    return [
        ("cause" if failure.end.rank is None else "went first", str(failure)),
        (f"log {failure.rank}", "\n".join([shown(failure.log), *failure.tail])),
    ]


def mlflow_fact(run: RunDirectory, state: RunState) -> str:
    """Says how to open MLflow, and how to mend it if it is behind."""
    try:
        missing = behind(run.path)
    except (UserError, OSError) as error:
        return f"{open_mlflow()}\n{printable(str(error))}"
    # While the job lives its mirror is at work, and always a little behind.
    if state.job.alive or not missing:
        return open_mlflow()
    mend = f"{count(missing, 'line')} behind: python workflows/runs.py sync {run.name}"
    return f"{open_mlflow()}\n{mend}"


def open_mlflow() -> str:
    uri = without_password(paths.tracking_uri())
    return uri if uri.startswith("http") else f"make mlflow   ({uri})"
