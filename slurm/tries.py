"""The tries of a job: when, on which nodes, why each ended, and whether another follows.

A file beside the logs, written by what looks after the job on its first node (slurm/supervisor.py) or on this
machine (slurm/local.py), and read by whoever tells the story.
"""

import json
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cvae.paths import write_atomically
from slurm import files
from slurm.evidence import first_failure
from slurm.files import TRY_MARK

Cause = Literal[
    "finished",
    "failed",  # said the function itself, as of a loss that is not finite
    "bad input",
    "cancelled",
    "signal",  # a SIGTERM that neither SLURM nor `runs.py cancel` has sent
    "time limit",
    "preempted",
    "crash",
    "node",
    "slurm",
]
# What may be the fault of the job itself, and go on for ever.
_COUNTED = ("crash", "time limit")
_BAD_NODE = ("crash", "node")
_FAILURES_OF_A_BAD_NODE = 2
KILLED_AT_LIMIT = "killed at the time limit, before it could save"
# sacct's words for a try that SLURM itself put back into the queue.
_OF_SLURM: dict[str, tuple[Cause, str]] = {
    "PREEMPTED": ("preempted", "preempted by SLURM"),
    "NODE_FAIL": ("node", "a node failed"),
    "REQUEUED": ("slurm", "requeued in SLURM"),
    "TIMEOUT": ("time limit", KILLED_AT_LIMIT),
    "OUT_OF_MEMORY": ("crash", "out of memory: killed by SLURM"),
    "CANCELLED": ("cancelled", "cancelled in SLURM"),
}


class Care(NamedTuple):
    """What a job that restarts by itself tells of itself."""

    progress: str
    """A glob; the last name in order changes whenever the job has got further (its newest checkpoint)."""
    after: str = ""
    """module:function, called as function(argument, how it ended, whether another try follows) at a bad end."""
    argument: str = ""


@dataclass(frozen=True)
class Try:
    number: int
    began: float
    """Unix seconds, as `ended`."""
    nodes: list[str]
    ended: float | None = None
    """None while it runs, and where nothing was left to write it down."""
    cause: Cause | None = None
    why: str = ""
    node: str = ""
    """Where it went wrong first; "" where that is not known."""
    progress: str = ""
    restarts: bool = False
    excluded: list[str] = field(default_factory=list)
    """Nodes that the next try is kept away from."""

    @property
    def last_words(self) -> str:
        follows = "it is tried again" if self.restarts else "it is not tried again"
        without = f" without {', '.join(self.excluded)}" if self.excluded else ""
        return f"{TRY_MARK}{self.number} ended: {self.why or self.cause}; {follows}{without}"


class Ending(NamedTuple):
    cause: Cause
    why: str
    node: str = ""


def read(folder: Path, job_id: str) -> list[Try]:
    """Oldest first; empty where the job has not begun, or is not looked after."""
    with suppress(OSError, ValueError, TypeError):
        return [Try(**entry) for entry in json.loads(files.tries_file(folder, job_id).read_text())]
    return []


def write(folder: Path, job_id: str, tries: list[Try]) -> None:
    text = json.dumps([asdict(one) for one in tries], indent=1)
    write_atomically(files.tries_file(folder, job_id), text + "\n")


def begin(
    folder: Path, job_id: str, nodes: list[str], now: float, word: str, progress: str
) -> list[Try]:
    """Notes a new try, and forgets the evidence of the one before. Returns all tries.

    word: SLURM's, for how the one before ended, where nobody was left to write that down. progress: as far
    as that one has come.
    """
    tries = read(folder, job_id)
    if tries and tries[-1].ended is None:
        before = unwatched(folder, job_id, tries[-1], now, word)
        tries[-1] = replace(before, progress=progress)
    for file in files.of_one_try(folder, job_id):
        file.unlink(missing_ok=True)
    tries.append(Try(len(tries) + 1, now, nodes))
    write(folder, job_id, tries)
    return tries


def unwatched(folder: Path, job_id: str, one: Try, when: float, word: str) -> Try:
    """A try that SLURM ended and nobody has written about, as its traces and SLURM's word tell."""
    cause, why = _OF_SLURM.get(word, ("slurm", f"ended by SLURM ({word or 'no word why'})"))
    node = ""
    result = _result(folder, job_id)
    if result is not None and result.get("reason"):
        why += f"; {result['reason']}"
    if cause == "node":
        failed = re.findall(r"Node failure on (\S+)", _log(folder, job_id))
        # Without a word from srun it was the node of srun itself.
        node = failed[-1] if failed else one.nodes[0]
        why = f"node {node} failed"
    return replace(one, ended=when, cause=cause, why=why, node=node, restarts=True)


def ending(
    folder: Path, job_id: str, status: int, preempted: bool = False, timed_out: bool = False
) -> Ending:
    """How a try ended whose ranks are all gone; status: srun's, or the worst of the ranks'.

    preempted, timed_out: whether SLURM has said so.
    """
    result = _result(folder, job_id) or {}
    said, reason = result.get("status"), str(result.get("reason") or "")
    if said == "finished" or (said is None and status == 0):
        return Ending("finished", "finished")
    if is_cancelled(folder, job_id):
        return Ending("cancelled", f"cancelled: {reason or 'before it could save'}")
    if said == "failed":
        return Ending("failed", reason)
    if said == "stopped" and "SIGUSR2" in reason:
        return Ending("time limit", f"the time limit is near: {reason}")
    if preempted:
        return Ending("preempted", f"preempted: {reason or 'before it could save'}")
    if said == "stopped":
        return Ending("signal", reason)
    if timed_out:
        return Ending("time limit", KILLED_AT_LIMIT)
    failure = first_failure(folder, job_id)
    if failure is None:
        killed = f" ({signal.strsignal(status - 128)})" if status > 128 else ""
        return Ending("crash", f"ended with status {status}{killed}")
    return Ending("bad input" if failure.bad_input else "crash", str(failure), failure.host)


def decide(
    end: Ending, progress: str, earlier: list[Try], max_restarts: int
) -> tuple[bool, Ending]:
    """Whether the job is to be tried again; and the ending, with the reason why not where that is news.

    A bad end is followed by at most max_restarts more without progress; what others did to the job, as a
    preemption or a failing node, by any number.
    """
    if end.cause not in _COUNTED:
        return end.cause in ("preempted", "node", "slurm"), end
    fruitless = 0
    for one in reversed(earlier):
        if one.progress != progress:
            break
        fruitless += one.cause in _COUNTED
    if fruitless < max_restarts:
        return True, end
    if max_restarts == 0:
        return False, end
    news = f"{end.why}; {fruitless + 1} tries in a row brought no new checkpoint"
    return False, end._replace(why=news)


def closed(
    told: list[Try],
    end: Ending,
    care: Care,
    restarts: bool,
    excluded: Sequence[str] = (),
) -> list[Try]:
    """The tries, the last one with its end."""
    last = replace(
        told[-1],
        ended=time.time(),
        cause=end.cause,
        why=end.why,
        node=end.node,
        progress=newest(care.progress),
        restarts=restarts,
        excluded=list(excluded),
    )
    return [*told[:-1], last]


def bad_nodes(tries: list[Try]) -> list[str]:
    """Nodes on which the job went wrong twice."""
    failures = [one.node for one in tries if one.node and one.cause in _BAD_NODE]
    names = dict.fromkeys(failures)
    return [name for name in names if failures.count(name) >= _FAILURES_OF_A_BAD_NODE]


def newest(progress: str) -> str:
    """The last name, in order, that the glob finds."""
    path = Path(progress)
    return max((found.name for found in path.parent.glob(path.name)), default="")


def mark_cancelled(folder: Path, job_id: str) -> None:
    """Whatever the job's ranks do from now on, it is not tried again."""
    files.cancelled_mark(folder, job_id).touch()


def is_cancelled(folder: Path, job_id: str) -> bool:
    return files.cancelled_mark(folder, job_id).exists()


def _result(folder: Path, job_id: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        result: dict[str, Any] = json.loads(files.result_file(folder, job_id).read_text())
        return result
    return None


def _log(folder: Path, job_id: str) -> str:
    with suppress(OSError):
        return files.log_file(folder, job_id, 0).read_text(errors="replace")
    return ""
