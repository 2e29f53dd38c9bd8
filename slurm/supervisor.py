"""Supervises a job on SLURM from its batch script: `python -m slurm.supervisor begin|watch|end …` around srun.

After a failure, at the time limit, and after a preemption that is only a signal, it asks SLURM to requeue the
job. A requeued job keeps its id, so everything that is known about it stays valid.
"""

import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeVar

from slurm import attempts
from slurm.attempts import FAULTS_OF_OTHERS, Attempt, AttemptEnd, Cause
from slurm.commands import Slurm, SlurmError
from slurm.supervision import AttemptLog, Supervision

NOT_HERE, GIVEN_UP = 75, 76
# By then a controller that restarts, or fails over to its backup, answers again.
_PATIENCE_S = 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
# SLURM accepts changes to a job only after it has finished requeueing it.
_UPDATE_PATIENCE_S = 20.0
_log = logging.getLogger("slurm.supervisor")
Answer = TypeVar("Answer")


def before(log: AttemptLog) -> int:
    """Records that an attempt begins; returns NOT_HERE or GIVEN_UP if it must not.

    It must not begin on a node that is known to be bad. If SLURM ended the attempts before without progress, it
    begins only after a pause, and after many of them not at all.
    """
    slurm = Slurm(None)
    here = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    was_open = log.is_open
    state = slurm.last_state(log.job_id) if _restarts() else ""
    log.settle(state, slurm.lost_nodes(log.last.nodes) if was_open else [])
    pause_s = attempts.pause_after_slurm(log.attempts) if was_open else 0.0
    last = log.last.end if log.attempts else None
    if last is not None and pause_s is None:
        in_vain = attempts.fruitless_before(log.attempts, FAULTS_OF_OTHERS) + 1
        log.close(replace(last, restarts=False, without_progress=in_vain))
        assert log.last.end is not None
        log.report_failure(log.last.end, restarts=False)
        return GIVEN_UP
    if last is not None and _is_unreported(last, was_open):
        log.report_failure(last, restarts=True)
    if last is not None and pause_s:
        log.say(f": {last.reason}; waits {pause_s:.0f} s")
        if not requeue(slurm, log.job_id):
            hold_off(slurm, log.job_id, [], pause_s)
            return NOT_HERE
    log.begin(here)
    excluded = nodes_to_exclude(slurm, log.attempts)
    if not set(excluded) & set(here) or not attempts.may_wait_for_other_nodes(log.attempts[:-1]):
        return 0
    running = log.last
    log.close(AttemptEnd(Cause.NOT_BEGUN, restarts=True, excluded=tuple(excluded), requeue="asked"))
    if refusal := requeue(slurm, log.job_id):
        # Better on a bad node than nowhere.
        _log.warning("%s; begins here all the same", refusal)
        log.attempts[-1] = running
        log.write()
        return 0
    hold_off(slurm, log.job_id, excluded, 0.0)
    return NOT_HERE


def _is_unreported(end: AttemptEnd, was_open: bool) -> bool:
    """Returns whether the ranks were gone before they, or a supervisor, could report the failure."""
    if end.cause == Cause.TIME_LIMIT:
        return not end.saved
    return was_open and end.cause in (Cause.NODE, Cause.CRASH)


def after(log: AttemptLog, status: int) -> None:
    """Records why the attempt ended and asks SLURM to requeue the job if it is to restart."""
    slurm = Slurm(None)
    silence = ""
    try:
        details = patiently(lambda: slurm.details(log.job_id))
    except SlurmError as error:
        details, silence = {}, str(error)
    # If SLURM itself has ended the attempt (preemption, a failed node, scancel), it decides what follows; and a
    # host that was out of reach may even wake up in the middle of the next attempt.
    ours = details.get("JobState") == "RUNNING" and int(details.get("Restarts", 0)) == _restarts()
    if not log.attempts or not (ours or silence):
        _log.info("attempt ended by SLURM: %s", details.get("JobState"))
        return
    preempted = details.get("PreemptTime", "None") not in ("None", "Unknown", "")
    end = log.diagnose(status, preempted)
    if silence:
        if end.restarts:
            end = replace(end, requeue="refused", refusal=silence, restarts=False)
        log.close(end)
        log.report_failure(end, restarts=False)
        return
    if end.cause in (Cause.CRASH, Cause.BAD_INPUT):
        log.report_failure(end, end.restarts)
    _close(slurm, log, end)


def _close(slurm: Slurm, log: AttemptLog, end: AttemptEnd) -> None:
    """Records the end of the last attempt and, if it restarts, asks SLURM to requeue the job.

    A requeued job is killed soon, perhaps before another word is written, and SLURM may refuse. So the file first
    says that SLURM is asked, and then what it has answered.
    """
    if not end.restarts:
        log.close(end)
        return
    ended = replace(log.last, end=end)
    excluded = nodes_to_exclude(slurm, [*log.attempts[:-1], ended])
    log.close(replace(end, excluded=tuple(excluded), requeue="asked"))
    refusal = requeue(slurm, log.job_id)
    log.answer(refusal)
    assert log.last.end is not None
    if refusal:
        log.close(log.last.end)
        log.report_failure(end, restarts=False, reason=f"{end.reason}; {log.last.end.outlook}")
        return
    hold_off(slurm, log.job_id, excluded, attempts.pause_after_failure(log.attempts))
    log.say(": SLURM has put it back into its queue")


def watch(open_log: Callable[[], AttemptLog]) -> NoReturn:
    """Waits, in the batch script's background, until SLURM ends the job, and handles the time limit.

    When SLURM kills everything, the end of the script is not reached; and a process that runs already has nothing
    to load in the few seconds between signal and kill.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        signal.sigwait({signal.SIGTERM})
        try:
            at_limit(open_log())
        except SlurmError as error:
            _log.error("the time limit: %s", error)


def at_limit(log: AttemptLog) -> None:
    """Asks SLURM to requeue a job that it ends at the time limit, as the ranks did not save in their grace time.

    Does nothing if SLURM ends the job for another reason, or if the end has been recorded already.
    """
    slurm = Slurm(None)
    details = patiently(lambda: slurm.details(log.job_id))
    is_up = details.get("Reason") == "TimeLimit" and details.get("JobState") != "RUNNING"
    ours = int(details.get("Restarts", 0)) == _restarts()
    if is_up and ours and log.is_open:
        _close(slurm, log, log.diagnose(128 + signal.SIGTERM, timed_out=True))


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def patiently(ask: Callable[[], Answer], patience_s: float = _PATIENCE_S) -> Answer:
    """Returns SLURM's answer, asking again while its controller is busy or restarts.

    Raises SlurmError if SLURM refuses, or still does not answer after patience_s.
    """
    pause_s, deadline = _FIRST_PAUSE_S, time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except SlurmError as error:
            if error.is_final or time.monotonic() + pause_s > deadline:
                raise
            _log.warning("%s; asking again in %g s", error, pause_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def requeue(slurm: Slurm, job_id: str) -> str:
    """Returns "" after SLURM has put the job back into its queue, or SLURM's answer if it refuses."""
    try:
        patiently(lambda: slurm.requeue(job_id))
    except SlurmError as error:
        return str(error)
    return ""


def hold_off(slurm: Slurm, job_id: str, excluded: list[str], pause_s: float) -> None:
    """Keeps a job that was just requeued off the excluded nodes, and from starting before pause_s have passed."""
    if excluded or pause_s:
        try:
            patiently(lambda: slurm.hold_off(job_id, excluded, pause_s), _UPDATE_PATIENCE_S)
        except SlurmError as error:
            _log.warning("its next start cannot be put off: %s", error)


def nodes_to_exclude(slurm: Slurm, earlier: list[Attempt]) -> list[str]:
    """Returns the nodes on which the job failed twice, as far as enough others like them are left."""
    excluded: list[str] = []
    needed = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    for node in attempts.bad_nodes(earlier):
        try:
            others = set(slurm.nodes_like(node, os.environ["SLURM_JOB_PARTITION"]))
        except SlurmError as error:
            _log.warning("%s: %s", node, error)
            continue
        if len(others - {*excluded, node}) >= needed:
            excluded.append(node)
        else:
            _log.warning("%s failed twice, but there are no %d others like it", node, needed)
    return excluded


def script_lines(
    folder: Path, supervision: Supervision, max_restarts: int
) -> tuple[list[str], list[str]]:
    """Returns the lines of the batch script before srun and after it."""
    arguments = [str(folder), json.dumps(supervision), str(max_restarts)]
    begin, watching, end = (
        shlex.join([sys.executable, "-m", "slurm.supervisor", action, *arguments])
        for action in ("begin", "watch", "end")
    )
    before = [
        begin,
        "begun=$?",
        f"[ $begun -ne {NOT_HERE} ] || exit 0",
        f"[ $begun -ne {GIVEN_UP} ] || exit 1",
        # When the script ends, SLURM kills its background at once.
        "trap : TERM",
        f"{watching} &",
        "watcher=$!",
        "disown",
    ]
    # Requeueing sends SIGTERM while something is still to be written.
    after = ["status=$?", "trap '' TERM", f'{end} "$status"']
    return before, [*after, 'kill -KILL "$watcher"', 'exit "$status"']


def main(action: str, folder: str, supervision: str, max_restarts: str, status: str = "0") -> int:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )

    def open_log() -> AttemptLog:
        supervised = Supervision(*json.loads(supervision))
        job_id = os.environ["SLURM_JOB_ID"]
        return AttemptLog(Path(folder), job_id, supervised, int(max_restarts))

    if action == "begin":
        # A requeue that it asks for ends the script, while there is still something to write.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return before(open_log())
    if action == "watch":
        watch(open_log)
    after(open_log(), int(status))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
