"""Looks after a job on SLURM, from its batch script: `python -m slurm.supervisor begin|watch|end …` around srun.

After a bad end, at the time limit, and where SLURM preempts by a signal alone, the job asks to be put back into
the queue; a requeued job is the same job, so everything that is known about it stays.
"""

import argparse
import importlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from cvae.errors import UserError
from slurm import attempts
from slurm.attempts import Care, Ending, Try
from slurm.commands import Slurm
from slurm.job_files import TRY_MARK
from slurm.requeue import hold_off, nodes_to_exclude, patiently, requeue

NOT_HERE, GIVEN_UP = 75, 76
_log = logging.getLogger("slurm.supervisor")


def before(folder: Path, care: Care) -> int:
    """Notes the try; returns NOT_HERE or GIVEN_UP if it must not begin.

    Not on a node that is known to be bad; only after a pause if SLURM ended the tries before without progress,
    and not at all after many of them.
    """
    slurm, job_id = Slurm(None), os.environ["SLURM_JOB_ID"]
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    word = slurm.last_word(job_id) if restarted else ""
    here = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
    open_ones = [one for one in attempts.read(folder, job_id) if one.ended is None]
    lost = slurm.lost_nodes(open_ones[-1].nodes) if open_ones else []
    told = attempts.settle(folder, job_id, time.time(), word, lost, attempts.newest(care.progress))
    goes_on, pause_s = attempts.goes_on(told) if open_ones else (True, 0.0)
    if (open_ones and told[-1].cause in ("node", "crash")) or _was_killed_at_limit(told):
        call_after(care, Ending("node", told[-1].why), restarts=goes_on)
    if not goes_on:
        end = Ending("node", f"{told[-1].why}; the last tries brought no new checkpoint")
        _note(folder, job_id, [*told[:-1], replace(told[-1], why=end.why, restarts=False)])
        call_after(care, end, restarts=False)
        return GIVEN_UP
    if pause_s:
        print(f"{TRY_MARK}{told[-1].number}: {told[-1].why}; waits {pause_s:.0f} s", flush=True)
        if not requeue(slurm, job_id):
            hold_off(slurm, job_id, [], pause_s)
            return NOT_HERE
    told = attempts.begin(folder, job_id, here, time.time(), word, attempts.newest(care.progress))
    print(f"{TRY_MARK}{told[-1].number} on {', '.join(here)}", flush=True)
    excluded = nodes_to_exclude(slurm, told)
    if not set(excluded) & set(here) or not attempts.shuns(told[:-1]):
        return 0
    end = Ending("not begun", f"not begun: {', '.join(excluded)} failed twice")
    _note(folder, job_id, attempts.closed(told, end, care, True, excluded, "asked"))
    if refusal := requeue(slurm, job_id):
        # Better on a bad node than nowhere.
        _log.warning("%s; begins here all the same", refusal)
        attempts.write(folder, job_id, told)
        return 0
    hold_off(slurm, job_id, excluded, 0.0)
    return NOT_HERE


def after(folder: Path, care: Care, status: int, max_restarts: int) -> None:
    """Says why the try ended and, where that is of use, has SLURM try again."""
    slurm, job_id = Slurm(None), os.environ["SLURM_JOB_ID"]
    told = attempts.read(folder, job_id)
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    silence = ""
    try:
        details = patiently(lambda: slurm.details(job_id))
    except UserError as error:
        details, silence = {}, str(error)
    # Where SLURM itself has ended the try (preemption, a failed node, scancel), it also knows what follows;
    # a host that was out of reach may even wake up in the middle of the next try.
    ours = details.get("JobState") == "RUNNING" and int(details.get("Restarts", 0)) == restarted
    if not told or not (ours or silence):
        _log.info("try ended by SLURM: %s", details.get("JobState"))
        return
    preempted = details.get("PreemptTime", "None") not in ("None", "Unknown", "")
    end = attempts.ending(folder, job_id, status, preempted)
    restarts, end = attempts.decide(end, attempts.newest(care.progress), told[:-1], max_restarts)
    if silence:
        told = attempts.closed(told, end, care, restarts)
        _note(folder, job_id, attempts.answered(told, silence) if restarts else told)
        call_after(care, end, restarts=False)
        return
    if end.cause in ("crash", "bad input"):
        call_after(care, end, restarts)
    _close(slurm, folder, job_id, care, told, end, restarts)


def _close(
    slurm: Slurm, folder: Path, job_id: str, care: Care, told: list[Try], end: Ending, again: bool
) -> None:
    """Writes down the end of the last try and, if it is to be tried again, asks SLURM for that.

    A job that is put back is killed soon, perhaps before another word is written; and SLURM may refuse. So the
    file says first that SLURM is asked, and then what it has answered.
    """
    told = attempts.closed(told, end, care, again)
    if not again:
        _note(folder, job_id, told)
        return
    excluded = nodes_to_exclude(slurm, told)
    told = attempts.closed(told, end, care, again, excluded, "asked")
    _note(folder, job_id, told)
    refusal = requeue(slurm, job_id)
    told = attempts.answered(told, refusal)
    if refusal:
        _note(folder, job_id, told)
        call_after(care, end._replace(why=f"{end.why}; {told[-1].follows}"), restarts=False)
        return
    hold_off(slurm, job_id, excluded, attempts.pause_after(told))
    attempts.write(folder, job_id, told)
    print(f"{TRY_MARK}{told[-1].number}: SLURM has put it back into its queue", flush=True)


def watch(folder: Path, care: Care, max_restarts: int) -> NoReturn:
    """In the batch script's background: waits for SLURM to end the job, and sees to it where the time is up.

    There and not at the end of the script, which does not come when SLURM kills everything. What runs already
    needs not to be loaded in the few seconds between signal and kill.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    while True:
        signal.sigwait({signal.SIGTERM})
        try:
            at_limit(folder, care, max_restarts)
        except UserError as error:
            _log.error("the time limit: %s", error)


def at_limit(folder: Path, care: Care, max_restarts: int) -> None:
    """Has SLURM try again what it ends at the time limit, as the ranks did not manage to save in their grace time.

    Whatever else SLURM ends (preempted, cancelled, requeued), or has been seen to already, is left alone.
    """
    slurm, job_id = Slurm(None), os.environ["SLURM_JOB_ID"]
    told = attempts.read(folder, job_id)
    details = patiently(lambda: slurm.details(job_id))
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    is_up = details.get("Reason") == "TimeLimit" and details.get("JobState") != "RUNNING"
    ours = int(details.get("Restarts", 0)) == restarted
    if not (is_up and ours and told and told[-1].ended is None):
        return
    end = attempts.ending(folder, job_id, 128 + signal.SIGTERM, timed_out=True)
    restarts, end = attempts.decide(end, attempts.newest(care.progress), told[:-1], max_restarts)
    _close(slurm, folder, job_id, care, told, end, restarts)


def _was_killed_at_limit(earlier: list[Try]) -> bool:
    return bool(earlier) and earlier[-1].why == attempts.KILLED_AT_LIMIT


def call_after(care: Care, end: Ending, restarts: bool) -> None:
    """Tells the job's own function of a bad end; what goes wrong in it changes nothing."""
    if not care.after:
        return
    module, _, name = care.after.partition(":")
    try:
        getattr(importlib.import_module(module), name)(care.argument, end.why, restarts)
    except Exception:
        _log.exception("%s", care.after)


def _note(folder: Path, job_id: str, told: list[Try]) -> None:
    attempts.write(folder, job_id, told)
    print(told[-1].last_words, flush=True)


def script_lines(folder: Path, care: Care, max_restarts: int) -> tuple[list[str], list[str]]:
    """What the batch script runs before srun and after it."""
    common = [sys.executable, "-m", "slurm.supervisor"]
    tail = [str(folder), json.dumps(care), str(max_restarts)]
    begin, watching, end = (
        shlex.join([*common, word, *tail]) for word in ("begin", "watch", "end")
    )
    return (
        [
            begin,
            "begun=$?",
            f"[ $begun -ne {NOT_HERE} ] || exit 0",
            f"[ $begun -ne {GIVEN_UP} ] || exit 1",
            # Where the script ends, SLURM kills its background at once.
            "trap : TERM",
            f"{watching} &",
            "watcher=$!",
            "disown",
        ],
        # To be requeued is to get SIGTERM, with some words still to be written.
        [
            "status=$?",
            "trap '' TERM",
            f'{end} --status "$status"',
            'kill -KILL "$watcher"',
            'exit "$status"',
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["begin", "watch", "end"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("care", type=lambda text: Care(*json.loads(text)))
    parser.add_argument("max_restarts", type=int)
    parser.add_argument("--status", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if options.action == "begin":
        # A requeue that is asked for here ends the script; what follows it has still to be said.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return before(options.folder, options.care)
    if options.action == "watch":
        watch(options.folder, options.care, options.max_restarts)
    after(options.folder, options.care, options.status, options.max_restarts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
