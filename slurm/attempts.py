"""The tries of a job: when, on which nodes, why each ended, and whether another follows.

A file beside the logs, written by what looks after the job on its first node (slurm/supervisor.py) or on this
machine (slurm/local_jobs.py), and read by whoever tells the story.
"""

import json
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import TypeAdapter

from cvae.files.paths import write_atomically
from slurm import job_files
from slurm.failure_diagnosis import first_failure, slurms_word
from slurm.job_files import TRY_MARK

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
    "not begun",  # on nodes that are known to be bad
]
# What may be the fault of the job itself, and go on for ever.
_COUNTED: tuple[Cause, ...] = ("crash", "time limit")
# What others did to the job, in a queue that may never tire of it.
_OF_OTHERS: tuple[Cause, ...] = ("node", "slurm")
_MOST_OF_OTHERS = 10
# A requeued job waits for its old credential to expire, by default 120 s; less is no pause.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 150.0, 3600.0
_MOST_NOT_BEGUN = 3
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
    requeue: Literal["", "asked", "accepted", "refused"] = ""
    """What has become of the request to SLURM to try it again; "asked" where nobody lived to hear the answer."""
    refusal: str = ""
    """SLURM's words, if it refused."""

    @property
    def follows(self) -> str:
        """What comes after it."""
        if self.requeue == "refused":
            return f"it was to be tried again, but {self.refusal}; it can be resumed by hand"
        if not self.restarts:
            return "it is not tried again"
        without = f" without {', '.join(self.excluded)}" if self.excluded else ""
        return f"{'SLURM is asked to try it' if self.requeue else 'it is tried'} again{without}"

    @property
    def last_words(self) -> str:
        return f"{TRY_MARK}{self.number} ended: {self.why or self.cause}; {self.follows}"


class Ending(NamedTuple):
    cause: Cause
    why: str
    node: str = ""


_TRIES = TypeAdapter(list[Try])
_RESULT = TypeAdapter(dict[str, Any])


def read(folder: Path, job_id: str) -> list[Try]:
    """Oldest first; empty if the job has not begun or is not looked after, or if the file is damaged."""
    with suppress(OSError, ValueError):  # pydantic's complaint is a ValueError
        return _TRIES.validate_json(job_files.tries_file(folder, job_id).read_bytes())
    return []


def write(folder: Path, job_id: str, tries: list[Try]) -> None:
    text = json.dumps([asdict(one) for one in tries], indent=1)
    write_atomically(job_files.tries_file(folder, job_id), text + "\n")


def settle(
    folder: Path, job_id: str, now: float, word: str, lost: Sequence[str], progress: str
) -> list[Try]:
    """Notes how the last try ended if SLURM has left nobody to do so. Returns all tries.

    word: sacct's, for how it ended. lost: its nodes that SLURM does not hear of now. progress: as far as it
    has come.
    """
    told = read(folder, job_id)
    if told and told[-1].ended is None:
        before = unwatched(folder, job_id, told[-1], now, word, lost)
        told[-1] = replace(before, progress=progress)
        write(folder, job_id, told)
    elif told and told[-1].requeue == "asked":
        told[-1] = replace(told[-1], requeue="accepted")
        write(folder, job_id, told)
    return told


def begin(
    folder: Path, job_id: str, nodes: list[str], now: float, word: str, progress: str
) -> list[Try]:
    """Notes a new try, and forgets the evidence of the one before. Returns all tries. See settle()."""
    tries = settle(folder, job_id, now, word, [], progress)
    for file in job_files.of_one_try(folder, job_id):
        file.unlink(missing_ok=True)
    tries.append(Try(len(tries) + 1, now, nodes))
    write(folder, job_id, tries)
    return tries


def unwatched(
    folder: Path, job_id: str, one: Try, when: float, word: str, lost: Sequence[str] = ()
) -> Try:
    """A try that SLURM ended and nobody has written about, as its traces and SLURM's word tell. See settle()."""
    logged, node = slurms_word(folder, job_id)
    if word not in _OF_SLURM:
        # No accounting, or one that is out of order.
        word = logged or ("NODE_FAIL" if lost else word)
    cause, why = _OF_SLURM.get(word, ("slurm", f"ended by SLURM ({word or 'no word why'})"))
    result = _result(folder, job_id)
    if result is not None and result.get("reason"):
        why += f"; {result['reason']}"
    if cause == "node":
        # Without a word from srun it was the node of srun itself.
        node = node or (lost[0] if lost else one.nodes[0])
        why = f"node {node} failed"
    else:
        node = ""
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

    A bad end is followed by at most max_restarts more without progress, a preemption by any number. For what
    SLURM has put back into its queue by itself, see goes_on().
    """
    if end.cause not in _COUNTED:
        return end.cause == "preempted", end
    fruitless = _fruitless(earlier, progress, _COUNTED)
    if fruitless < max_restarts:
        return True, end
    if max_restarts == 0:
        return False, end
    news = f"{end.why}; {fruitless + 1} tries in a row brought no new checkpoint"
    return False, end._replace(why=news)


def goes_on(told: list[Try]) -> tuple[bool, float]:
    """After a try that SLURM has ended and repeats by itself: whether to, and the pause before it, in seconds.

    Lost nodes, and whatever else SLURM ends without a preemption, must not use up a cluster without progress.
    """
    if told[-1].cause not in _OF_OTHERS:
        return True, 0.0
    fruitless = _fruitless(told[:-1], told[-1].progress, _OF_OTHERS)
    return fruitless < _MOST_OF_OTHERS, pause_s(fruitless)


def pause_s(fruitless: int) -> float:
    """Before the next try, after so many that brought nothing new."""
    return min(_FIRST_PAUSE_S * 2 ** (fruitless - 1), _LONGEST_PAUSE_S) if fruitless else 0.0


def pause_after(told: list[Try]) -> float:
    """Seconds before the next try, after one that ended badly by itself."""
    if told[-1].cause not in _COUNTED:
        return 0.0
    return pause_s(_fruitless(told[:-1], told[-1].progress, _COUNTED))


def shuns(told: list[Try]) -> bool:
    """Whether the job may still wait for other nodes: SLURM may not hear of those that it is to be kept from."""
    last = told[-_MOST_NOT_BEGUN:]
    return len(last) < _MOST_NOT_BEGUN or any(one.cause != "not begun" for one in last)


def _fruitless(earlier: list[Try], progress: str, causes: Sequence[Cause]) -> int:
    """Counts the last tries in a row that ended for one of the causes and got no further than `progress`."""
    number = 0
    for one in reversed(earlier):
        if one.progress != progress:
            break
        number += one.cause in causes
    return number


def closed(
    told: list[Try],
    end: Ending,
    care: Care,
    restarts: bool,
    excluded: Sequence[str] = (),
    requeue: Literal["", "asked"] = "",
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
        requeue=requeue,
    )
    return [*told[:-1], last]


def answered(told: list[Try], refusal: str) -> list[Try]:
    """The tries, the last one with SLURM's answer to the request to try it again; refusal: "", or its words."""
    if not refusal:
        return [*told[:-1], replace(told[-1], requeue="accepted")]
    last = replace(told[-1], requeue="refused", refusal=refusal, restarts=False, excluded=[])
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
    job_files.cancelled_mark(folder, job_id).touch()


def is_cancelled(folder: Path, job_id: str) -> bool:
    return job_files.cancelled_mark(folder, job_id).exists()


def _result(folder: Path, job_id: str) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        return _RESULT.validate_json(job_files.result_file(folder, job_id).read_bytes())
    return None
