"""Finds out how an attempt ended from what its ranks, srun and SLURM have left in the logs' folder."""

import json
import re
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from slurm.attempts import (
    ATTEMPT_MARK,
    Attempt,
    AttemptEnd,
    Cause,
    failure_file,
    is_cancelled,
    log_file,
    result_file,
)

CONTROLLER_LOG = "controller.out"
SETUP_ERROR = "error: setup in the cluster file: "
"""Begins the line with which a batch script ends whose setup failed."""
_TAIL_LINES = 12
_SIGNALS = {signal.strsignal(number): number.name for number in signal.Signals}
# If SLURM confines jobs by cgroups, it counts the processes that the kernel has killed there.
_OOM_KILL = re.compile(r"Detected \d+ oom.kill event")
# What SLURM writes into the log of a job that it ends, and the corresponding state in sacct.
_DUE_TO = re.compile(r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+ DUE TO ([A-Z ]+)")
_STATES = {
    "NODE FAILURE": "NODE_FAIL",
    "PREEMPTION": "PREEMPTED",
    "TIME LIMIT": "TIMEOUT",
    "JOB REQUEUE": "REQUEUED",
}
_CAUSES = {
    "PREEMPTED": Cause.PREEMPTED,
    "NODE_FAIL": Cause.NODE,
    "REQUEUED": Cause.SLURM,
    "TIMEOUT": Cause.TIME_LIMIT,
    "OUT_OF_MEMORY": Cause.CRASH,
    "CANCELLED": Cause.CANCELLED,
}
_LOST_NODE = re.compile(r"Node failure on ([^\s,]+)", re.IGNORECASE)
# What ranks report after another one has gone: a consequence, even if their clocks put it first.
_CONSEQUENCE = re.compile(r"gloo|NCCL|Connection (closed|reset)|DistBackendError|DistNetworkError")

_RESULT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, str | list[str] | None])


class Failure(NamedTuple):
    """What went wrong first in a job, with the evidence."""

    end: AttemptEnd
    log: Path
    tail: list[str]
    """The last lines of the log."""

    @property
    def rank(self) -> int:
        """The rank whose log it is."""
        return self.end.rank or 0

    def __str__(self) -> str:
        return self.end.reason


def first_failure(folder: Path, job_id: str) -> Failure | None:
    """Returns the rank that failed first, or the line of setup; None if the logs in the folder show neither."""
    end = _setup_failure(folder, job_id) or _rank_failure(folder, job_id)
    if end is None:
        return None
    log = log_file(folder, job_id, end.rank or 0)
    return Failure(end, log, tail(log, _TAIL_LINES))


def diagnose(
    folder: Path, job_id: str, status: int, preempted: bool = False, timed_out: bool = False
) -> AttemptEnd:
    """Returns how an attempt ended whose ranks are all gone.

    status: the exit status of srun, or that of the first rank that failed. preempted, timed_out: whether SLURM has
    reported so.
    """
    result_status, end = _reported_by_function(folder, job_id)
    if result_status == "finished" or (result_status == "" and status == 0):
        return AttemptEnd(Cause.FINISHED)
    if is_cancelled(folder, job_id):
        cause = Cause.CANCELLED
    elif result_status == "failed":
        cause = Cause.FAILED
    elif end.saved and "SIGUSR2" in end.signals:
        cause = Cause.TIME_LIMIT
    elif preempted:
        cause = Cause.PREEMPTED
    elif end.saved:
        cause = Cause.SIGNAL
    elif timed_out:
        cause = Cause.TIME_LIMIT
    elif failure := first_failure(folder, job_id):
        return failure.end
    else:
        return AttemptEnd(Cause.CRASH, signals=signals_of(status - 128), exit_status=status)
    return replace(end, cause=cause)


def diagnose_unrecorded(
    folder: Path, job_id: str, attempt: Attempt, slurm_state: str, lost: Sequence[str] = ()
) -> AttemptEnd:
    """Returns how an attempt ended that SLURM ended and requeues, with nobody left to record it.

    slurm_state: the attempt's state in sacct, "" if unknown. lost: those of its nodes that SLURM cannot reach now.
    """
    logged_state, node = logged_end(folder, job_id)
    if slurm_state not in _CAUSES:
        # There is no accounting, or it is down.
        slurm_state = logged_state or ("NODE_FAIL" if lost else slurm_state)
    end = replace(
        _reported_by_function(folder, job_id)[1],
        cause=_CAUSES.get(slurm_state, Cause.SLURM),
        out_of_memory=slurm_state == "OUT_OF_MEMORY",
        slurm_state=slurm_state,
        restarts=True,
    )
    if end.cause != Cause.NODE:
        return end
    # If srun names no node, it was the node that srun itself ran on.
    return replace(end, node=node or (lost[0] if lost else attempt.nodes[0]))


def logged_end(folder: Path, job_id: str) -> tuple[str, str]:
    """Returns why SLURM ended the last attempt, as a state of sacct, and the node it lost; from the job's log.

    Either is "" if the log does not show it.
    """
    log = log_file(folder, job_id, 0)
    if not log.exists():
        return "", ""
    text = _last_attempt(log)
    states = [_STATES.get(words.strip(), "") for words in _DUE_TO.findall(text)]
    if nodes := _LOST_NODE.findall(text):
        return "NODE_FAIL", nodes[-1]
    return next(filter(None, reversed(states)), ""), ""


def signals_of(number: int) -> tuple[str, ...]:
    """Returns the name of a signal in a tuple; () if there is no such signal."""
    return tuple(one.name for one in signal.Signals if one == number)


def tail(log: Path, lines: int) -> list[str]:
    """Returns the last lines of a file, without those of submitit's own; [] if it cannot be read."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip() and "submitit" not in line][-lines:]


def _setup_failure(folder: Path, job_id: str) -> AttemptEnd | None:
    with suppress(OSError):
        text = log_file(folder, job_id, 0).read_text(errors="replace").rpartition(ATTEMPT_MARK)[2]
        if found := re.search(f"^{re.escape(SETUP_ERROR)}(.+)$", text, re.MULTILINE):
            return AttemptEnd(Cause.SETUP, message=found.group(1))
    return None


def _rank_failure(folder: Path, job_id: str) -> AttemptEnd | None:
    """Returns the end of the rank that failed first; None if nothing shows one."""
    ends = _rank_ends(folder, job_id)
    reports = _rank_reports(folder, job_id)
    # A killed rank leaves no report, while those that miss it do. A rank that raised waits a little before it
    # exits, so the order of the reports is more reliable than that of mere exits.
    if not ends or (reports and ends[0].exit_status is not None):
        return reports[0] if reports else None
    log = log_file(folder, job_id, 0)
    killed = ends[0].signals == ("SIGKILL",) and log.exists()
    oom = killed and _OOM_KILL.search(_last_attempt(log)) is not None
    return replace(ends[0], out_of_memory=ends[0].out_of_memory or oom)


def _rank_ends(folder: Path, job_id: str) -> list[AttemptEnd]:
    """Returns the ranks that ended badly, in the order in which srun saw it."""
    rows = []
    # The controllers of older local jobs used srun's words, and reported nothing.
    controller, srun = folder / CONTROLLER_LOG, log_file(folder, job_id, 0)
    if controller.exists():
        pattern = rf"^job {job_id}: ()task (\d+): (.+)$"
        rows += re.findall(pattern, _last_attempt(controller), re.MULTILINE)
    if srun.exists():
        pattern = r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)$"
        rows += re.findall(pattern, _last_attempt(srun), re.MULTILINE)
    return [_rank_end(node, int(rank), words) for node, rank, words in rows]


def _rank_end(node: str, rank: int, words: str) -> AttemptEnd:
    """words: those of srun, such as "Killed", "Out Of Memory", "Exited with exit code 1"."""
    end = AttemptEnd(Cause.CRASH, node, rank)
    if exited := re.fullmatch(r"Exited with exit code (\d+)", words):
        return replace(end, exit_status=int(exited.group(1)))
    name = _SIGNALS.get(words.removesuffix(" (core dumped)"))
    if name is not None:
        return replace(end, signals=(name,))
    return replace(end, out_of_memory=words == "Out Of Memory", message=words)


def _rank_reports(folder: Path, job_id: str) -> list[AttemptEnd]:
    """Returns what ranks, or a local job's controller, reported: causes first, and killed ranks before others."""
    reports = []
    for file in failure_files(folder, job_id):
        with suppress(OSError, ValueError, KeyError):
            report = json.loads(file.read_text())
            end = AttemptEnd(
                Cause.BAD_INPUT if report.get("bad_input") else Cause.CRASH,
                report["host"],
                report["rank"],
                tuple(report.get("signals", ())),
                report.get("exit_status"),
                message=report["error"],
            )
            is_consequence = _CONSEQUENCE.search(end.message) is not None
            reports.append((is_consequence, not end.signals, report["time"], end.rank, end))
    return [end for *_, end in sorted(reports, key=lambda report: report[:4])]


def failure_files(folder: Path, job_id: str) -> list[Path]:
    pattern = failure_file(folder, job_id, 0).name.replace("_0_", "_*_")
    return sorted(folder.glob(pattern))


def _last_attempt(log: Path) -> str:
    """Returns what the last attempt wrote into a log, to which every attempt appends."""
    text = log.read_text(errors="replace")
    begins = rf"^{ATTEMPT_MARK}\d+ on |Starting with JobEnvironment"
    return re.split(begins, text, flags=re.MULTILINE)[-1]


def _reported_by_function(folder: Path, job_id: str) -> tuple[str, AttemptEnd]:
    """Returns the status of the function's result and the end that it describes; "" if there is no result."""
    result: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        result = _RESULT.validate_json(result_file(folder, job_id).read_bytes())
    status, signals = result.get("status", ""), tuple(result.get("signals", ()))
    message = str(result.get("reason") or "")
    end = AttemptEnd(Cause.CRASH, signals=signals, saved=status == "stopped", message=message)
    return status, end
