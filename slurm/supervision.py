"""What the supervisors of jobs on SLURM and on this machine share: the record of the attempts."""

import importlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from slurm import attempts
from slurm.attempts import ATTEMPT_MARK, Attempt, AttemptEnd, result_file
from slurm.failure_diagnosis import diagnose, diagnose_unrecorded, failure_files

_log = logging.getLogger("slurm.supervisor")


class Supervision(NamedTuple):
    """How a job that restarts by itself shows its progress, and whom it informs of a failure."""

    progress: str
    """A glob; its last match in order changes whenever the job has got further (its newest checkpoint)."""
    on_failure: str = ""  # module:function, called as function(argument, reason, message, restarts)
    argument: str = ""


class AttemptLog:
    """The attempts of one job, read from its file; every change is written there at once."""

    def __init__(self, folder: Path, job_id: str, supervision: Supervision, max_restarts: int = 0):
        self.folder, self.job_id = folder, job_id
        self.supervision, self.max_restarts = supervision, max_restarts
        self.attempts = attempts.read(folder, job_id)

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]

    @property
    def is_open(self) -> bool:
        """Whether the last attempt runs, or ended with nobody left to record it."""
        return bool(self.attempts) and self.last.end is None

    def write(self) -> None:
        attempts.write(self.folder, self.job_id, self.attempts)

    def settle(self, slurm_state: str = "", lost: Sequence[str] = ()) -> None:
        """Records the end of an attempt that SLURM ended and has requeued. See diagnose_unrecorded()."""
        if self.is_open:
            end = diagnose_unrecorded(self.folder, self.job_id, self.last, slurm_state, lost)
            self._set_end(end)
        elif self.attempts and self.last.end and self.last.end.requeue == "asked":
            self.answer("")

    def begin(self, nodes: list[str]) -> None:
        """Records a new attempt, says so in the log, and removes the reports of the one before."""
        reports = failure_files(self.folder, self.job_id)
        for file in [*reports, result_file(self.folder, self.job_id)]:
            file.unlink(missing_ok=True)
        self.attempts.append(Attempt(len(self.attempts) + 1, time.time(), nodes))
        self.write()
        self.say(f" on {', '.join(nodes)}")

    def diagnose(self, status: int, preempted: bool = False, timed_out: bool = False) -> AttemptEnd:
        """Returns how the last attempt ended and whether another follows. See failure_diagnosis.diagnose()."""
        end = diagnose(self.folder, self.job_id, status, preempted, timed_out)
        progress = attempts.newest(self.supervision.progress)
        return attempts.decide(end, progress, self.attempts[:-1], self.max_restarts)

    def close(self, end: AttemptEnd) -> None:
        """Records the end of the last attempt and says so in the log."""
        self._set_end(end)
        self.say(f" ended: {end.reason}; {end.outlook}")

    def answer(self, refusal: str) -> None:
        """Records SLURM's answer to the request to requeue the job; refusal: "" if it accepted."""
        self.attempts[-1] = attempts.answered(self.last, refusal)
        self.write()

    def say(self, words: str) -> None:
        print(f"{ATTEMPT_MARK}{self.last.number}{words}", flush=True)

    def report_failure(self, end: AttemptEnd, restarts: bool, reason: str = "") -> None:
        """Calls the job's own function; an exception in it changes nothing."""
        if not self.supervision.on_failure:
            return
        module, _, name = self.supervision.on_failure.partition(":")
        arguments = (self.supervision.argument, reason or end.reason, end.message, restarts)
        try:
            getattr(importlib.import_module(module), name)(*arguments)
        except Exception:
            _log.exception("%s", self.supervision.on_failure)

    def _set_end(self, end: AttemptEnd) -> None:
        progress = attempts.newest(self.supervision.progress)
        self.attempts[-1] = replace(self.last, ended=time.time(), end=end, progress=progress)
        self.write()
