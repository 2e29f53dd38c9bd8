"""The attempts of a job: when and where each ran, how it ended, and whether another one follows.

The job's supervisor (slurm/supervisor.py on SLURM, slurm/local_jobs.py on this machine) writes them to
<job>_tries.json next to the logs; commands such as `runs.py show` read that file.
"""

import json
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter

from cvae.files.paths import write_atomically

ATTEMPT_MARK = "=== try "
"""Begins the lines of a log that say where an attempt begins ("=== try 2 on n1, n2") and how it ended."""


class Cause(str, Enum):
    """Why an attempt ended; the values are those of the file."""

    FINISHED = "finished"
    FAILED = "failed"  # as the function's own result says, e.g. because a loss is not finite
    BAD_INPUT = "bad input"
    CANCELLED = "cancelled"
    SIGNAL = "signal"  # a SIGTERM that neither SLURM nor `runs.py cancel` has sent
    TIME_LIMIT = "time limit"
    PREEMPTED = "preempted"
    CRASH = "crash"
    NODE = "node"
    SLURM = "slurm"
    SETUP = "setup"  # a line of setup in the cluster file failed, before any rank began
    NOT_BEGUN = "not begun"  # on nodes that are known to be bad


# What may be the fault of the job itself, and what others do to it: without progress neither is repeated for ever.
OWN_FAULTS = (Cause.CRASH, Cause.TIME_LIMIT)
FAULTS_OF_OTHERS = (Cause.NODE, Cause.SLURM)
_MOST_FAULTS_OF_OTHERS = 10
# A requeued job waits until its old credential has expired, by default 120 s; a shorter pause has no effect.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 150.0, 3600.0
_MOST_NOT_BEGUN = 3
_FAILURES_OF_A_BAD_NODE = 2
_SIGNALS = {number.name: f"{signal.strsignal(number)} ({number.name})" for number in signal.Signals}


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended and whether another follows; `reason` and `outlook` put that into words."""

    cause: Cause
    node: str = ""  # the node that failed first; "" if unknown
    rank: int | None = None  # the rank that failed first
    signals: tuple[str, ...] = ()  # what killed that rank or made all ranks save, e.g. ("SIGKILL",)
    exit_status: int | None = None  # of that rank or, if no rank is known, of srun
    out_of_memory: bool = False
    saved: bool = False  # whether the ranks saved their state because of the signals
    message: str = ""
    """The exception of that rank, the reason that the function gave, or the complaint about setup."""
    slurm_state: str = ""
    """The job's state in sacct if SLURM ended the attempt and nobody on its nodes recorded that."""
    without_progress: int = 0
    """If the job is given up for want of progress: the attempts in a row that brought no new checkpoint."""
    restarts: bool = False
    requeue: Literal["", "asked", "accepted", "refused"] = ""
    """The state of the request to SLURM to requeue the job; "asked" if nobody lived to hear the answer."""
    refusal: str = ""  # SLURM's answer if it refused
    excluded: tuple[str, ...] = ()  # nodes that the next attempt must not use
    text: str = ""  # the reason as a sentence, in files that were written before the fields existed

    @property
    def reason(self) -> str:
        """Returns the cause as a sentence."""
        if self.text:
            return self.text
        news = f"; {self.without_progress} attempts in a row brought no new checkpoint"
        return self._cause_in_words() + (news if self.without_progress else "")

    @property
    def outlook(self) -> str:
        """Returns what follows the attempt, as part of a sentence."""
        if self.requeue == "refused":
            return f"it should have restarted, but {self.refusal}; resume it by hand"
        if not self.restarts:
            return "it does not restart"
        without = f" without {', '.join(self.excluded)}" if self.excluded else ""
        return f"{'SLURM is asked to requeue it' if self.requeue else 'it restarts'}{without}"

    def _cause_in_words(self) -> str:
        in_slurm = " in SLURM" if self.slurm_state else ""
        unsaved = "before it could save"
        words = {
            Cause.CANCELLED: f"cancelled{in_slurm}: {self.message or unsaved}",
            Cause.PREEMPTED: f"preempted{in_slurm}: {self.message or unsaved}",
            Cause.TIME_LIMIT: f"time limit: {self.message or f'killed {unsaved}'}",
            Cause.NODE: f"node {self.node} failed",
            Cause.SLURM: f"ended by SLURM ({self.slurm_state or 'it gives no reason'})",
            Cause.SETUP: f"setup in the cluster file: {self.message}",
            Cause.NOT_BEGUN: f"not begun: {', '.join(self.excluded)} failed twice",
            Cause.CRASH: self._failure_in_words(),
            Cause.BAD_INPUT: self._failure_in_words(),
        }
        return words.get(self.cause, self.message or self.cause.value)

    def _failure_in_words(self) -> str:
        killed = ", ".join(_SIGNALS.get(name, name) for name in self.signals)
        if self.rank is None and self.exit_status is not None:
            return f"ended with status {self.exit_status}" + (f": {killed}" if killed else "")
        how = self.message or killed or f"exited with status {self.exit_status}"
        if self.out_of_memory:
            how = "out of memory: killed (SIGKILL)"
        elif self.signals == ("SIGKILL",):
            how = "killed (SIGKILL), perhaps because memory ran out"
        where = f" on {self.node}" if self.node else ""
        return how if self.rank is None else f"rank {self.rank}{where}: {how}"


def _with_end(raw: Any) -> Any:
    """Accepts an attempt from a file that has the end's few fields among those of the attempt."""
    if not isinstance(raw, dict) or "cause" not in raw:
        return raw
    end = {**raw, "text": raw.get("why", "")} if raw["cause"] else None
    return {**raw, "end": end}


@dataclass(frozen=True)
class Attempt:
    number: int
    began: float  # unix seconds, as `ended`
    nodes: list[str]
    ended: float | None = None
    end: AttemptEnd | None = None  # None while it runs, and if nobody was left to record the end
    progress: str = ""  # the newest checkpoint at its end

    @property
    def cause(self) -> Cause | None:
        return self.end.cause if self.end else None

    @property
    def restarts(self) -> bool:
        return self.end is not None and self.end.restarts


_ATTEMPTS = TypeAdapter(list[Annotated[Attempt, BeforeValidator(_with_end)]])


def log_file(folder: Path, job_id: str, rank: int) -> Path:
    """Returns the file that a rank writes to; SLURM's own messages are in that of rank 0."""
    return folder / f"{job_id}_{rank}_log.out"


def failure_file(folder: Path, job_id: str, rank: int) -> Path:
    """Returns the file in which a rank reports why it fails, if it still can."""
    return folder / f"{job_id}_{rank}_failure.json"


def result_file(folder: Path, job_id: str) -> Path:
    """Returns the file in which rank 0 reports the status, reason and signals of the function's result."""
    return folder / f"{job_id}_0_result.json"


def attempts_file(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_tries.json"


def _cancelled_mark(folder: Path, job_id: str) -> Path:
    return folder / f"{job_id}_cancelled"


def read(folder: Path, job_id: str) -> list[Attempt]:
    """Returns the attempts, oldest first; [] if there are none yet, or the file is missing or damaged."""
    with suppress(OSError, ValueError):  # pydantic's ValidationError is a ValueError
        return _ATTEMPTS.validate_json(attempts_file(folder, job_id).read_bytes())
    return []


def write(folder: Path, job_id: str, attempts: list[Attempt]) -> None:
    text = json.dumps([asdict(attempt) for attempt in attempts], indent=1)
    write_atomically(attempts_file(folder, job_id), text + "\n")


def mark_cancelled(folder: Path, job_id: str) -> None:
    """Keeps the job from being restarted, however its ranks end."""
    _cancelled_mark(folder, job_id).touch()


def is_cancelled(folder: Path, job_id: str) -> bool:
    return _cancelled_mark(folder, job_id).exists()


def answered(attempt: Attempt, refusal: str) -> Attempt:
    """Returns the attempt with SLURM's answer to the request to requeue it; refusal: "" if it accepted."""
    assert attempt.end is not None
    answer: dict[str, Any] = {"requeue": "accepted"}
    if refusal:
        answer = {"requeue": "refused", "refusal": refusal, "restarts": False, "excluded": ()}
    return replace(attempt, end=replace(attempt.end, **answer))


def decide(end: AttemptEnd, progress: str, earlier: list[Attempt], max_restarts: int) -> AttemptEnd:
    """Returns the end with the decision whether the job restarts.

    A failure is followed by at most max_restarts more without progress, a preemption by any number. For what SLURM
    requeues by itself, see pause_after_slurm().
    """
    if end.cause not in OWN_FAULTS:
        return replace(end, restarts=end.cause == Cause.PREEMPTED)
    fruitless = _fruitless(earlier, progress, OWN_FAULTS)
    if fruitless < max_restarts:
        return replace(end, restarts=True)
    return replace(end, without_progress=fruitless + 1 if max_restarts else 0)


def fruitless_before(attempts: list[Attempt], causes: Sequence[Cause]) -> int:
    """Counts the attempts in a row before the last that ended for one of the causes and got as far as it."""
    return _fruitless(attempts[:-1], attempts[-1].progress, causes)


def pause_after_slurm(attempts: list[Attempt]) -> float | None:
    """Returns the pause in seconds after an attempt that SLURM ended and repeats by itself; None to give up.

    A job that loses its nodes again and again must not use up a cluster without any progress.
    """
    if attempts[-1].cause not in FAULTS_OF_OTHERS:
        return 0.0
    fruitless = fruitless_before(attempts, FAULTS_OF_OTHERS)
    return None if fruitless >= _MOST_FAULTS_OF_OTHERS else _pause_s(fruitless)


def pause_after_failure(attempts: list[Attempt]) -> float:
    """Returns the pause in seconds after an attempt that failed by itself."""
    if attempts[-1].cause not in OWN_FAULTS:
        return 0.0
    return _pause_s(fruitless_before(attempts, OWN_FAULTS))


def may_wait_for_other_nodes(attempts: list[Attempt]) -> bool:
    """Returns False if the last attempts all refused bad nodes: SLURM may ignore which nodes a job excludes."""
    last = attempts[-_MOST_NOT_BEGUN:]
    return len(last) < _MOST_NOT_BEGUN or any(one.cause != Cause.NOT_BEGUN for one in last)


def bad_nodes(attempts: list[Attempt]) -> list[str]:
    """Returns the nodes on which the job failed twice."""
    ends = [attempt.end for attempt in attempts if attempt.end is not None]
    nodes = [end.node for end in ends if end.node and end.cause in (Cause.CRASH, Cause.NODE)]
    return [node for node in dict.fromkeys(nodes) if nodes.count(node) >= _FAILURES_OF_A_BAD_NODE]


def newest(progress: str) -> str:
    """Returns the last name, in order, that matches the glob; "" if none does."""
    path = Path(progress)
    return max((match.name for match in path.parent.glob(path.name)), default="")


def _pause_s(fruitless: int) -> float:
    return min(_FIRST_PAUSE_S * 2 ** (fruitless - 1), _LONGEST_PAUSE_S) if fruitless else 0.0


def _fruitless(earlier: list[Attempt], progress: str, causes: Sequence[Cause]) -> int:
    """Counts the last attempts in a row that ended for one of the causes and got no further than `progress`."""
    number = 0
    for attempt in reversed(earlier):
        if attempt.progress != progress:
            break
        number += attempt.cause in causes
    return number
