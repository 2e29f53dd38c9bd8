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
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from cvae.errors import UserError
from slurm import tries
from slurm.client import Slurm
from slurm.files import TRY_MARK
from slurm.tries import Care, Ending, Try

# SLURM takes changes to a job only once its requeueing is through.
_REQUEUE_PATIENCE_S = 20.0
NOT_HERE = 75
_log = logging.getLogger("slurm.supervisor")


def before(folder: Path, care: Care) -> int:
    """Notes the try; returns NOT_HERE where it must not begin, as one of its nodes is known to be bad."""
    slurm, job_id = Slurm(None), os.environ["SLURM_JOB_ID"]
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    word = slurm.last_word(job_id) if restarted else ""
    here = _expand(os.environ["SLURM_JOB_NODELIST"])
    unwatched = any(one.ended is None for one in tries.read(folder, job_id))
    told = tries.begin(folder, job_id, here, time.time(), word, tries.newest(care.progress))
    print(f"{TRY_MARK}{told[-1].number} on {', '.join(here)}", flush=True)
    if (unwatched and told[-2].cause in ("node", "crash")) or _was_killed_at_limit(told[:-1]):
        call_after(care, Ending("node", told[-2].why), restarts=True)
    excluded = _to_exclude(slurm, told)
    if not set(excluded) & set(here):
        return 0
    end = Ending("slurm", f"not begun: {', '.join(excluded)} failed twice")
    _note(folder, job_id, tries.closed(told, end, care, restarts=True, excluded=excluded))
    _requeue(slurm, job_id, excluded)
    return NOT_HERE


def after(folder: Path, care: Care, status: int, max_restarts: int) -> None:
    """Says why the try ended and, where that is of use, has SLURM try again."""
    slurm, job_id = Slurm(None), os.environ["SLURM_JOB_ID"]
    told = tries.read(folder, job_id)
    details = _details(slurm, job_id)
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    # Where SLURM itself has ended the try (preemption, a failed node, scancel), it also knows what follows;
    # a host that was out of reach may even wake up in the middle of the next try.
    ours = details.get("JobState") == "RUNNING" and int(details.get("Restarts", 0)) == restarted
    if not ours or not told:
        _log.info("try ended by SLURM: %s", details.get("JobState"))
        return
    preempted = details.get("PreemptTime", "None") not in ("None", "Unknown", "")
    end = tries.ending(folder, job_id, status, preempted)
    restarts, end = tries.decide(end, tries.newest(care.progress), told[:-1], max_restarts)
    told = tries.closed(told, end, care, restarts)
    excluded = _to_exclude(slurm, told) if restarts else []
    _note(folder, job_id, tries.closed(told, end, care, restarts, excluded))
    if end.cause in ("crash", "bad input"):
        call_after(care, end, restarts)
    if restarts:
        _requeue(slurm, job_id, excluded)


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
    told = tries.read(folder, job_id)
    details = _details(slurm, job_id)
    restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    is_up = details.get("Reason") == "TimeLimit" and details.get("JobState") != "RUNNING"
    ours = int(details.get("Restarts", 0)) == restarted
    if not (is_up and ours and told and told[-1].ended is None):
        return
    end = tries.ending(folder, job_id, 128 + signal.SIGTERM, timed_out=True)
    restarts, end = tries.decide(end, tries.newest(care.progress), told[:-1], max_restarts)
    _note(folder, job_id, tries.closed(told, end, care, restarts))
    if restarts:
        _requeue(slurm, job_id, [])


def _was_killed_at_limit(earlier: list[Try]) -> bool:
    return bool(earlier) and earlier[-1].why == tries.KILLED_AT_LIMIT


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
    tries.write(folder, job_id, told)
    print(told[-1].last_words, flush=True)


def _to_exclude(slurm: Slurm, told: list[Try]) -> list[str]:
    """The nodes that failed twice, as far as the job can do without them."""
    excluded: list[str] = []
    needed = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    for node in tries.bad_nodes(told):
        try:
            others = set(slurm.nodes_like(node, os.environ["SLURM_JOB_PARTITION"]))
        except UserError as error:
            _log.warning("%s: %s", node, error)
            continue
        if len(others - {*excluded, node}) >= needed:
            excluded.append(node)
        else:
            _log.warning("%s failed twice, but there are no %d others like it", node, needed)
    return excluded


def _requeue(slurm: Slurm, job_id: str, excluded: list[str]) -> None:
    slurm.requeue(job_id)
    deadline = time.monotonic() + _REQUEUE_PATIENCE_S
    while excluded and time.monotonic() < deadline:
        with suppress(UserError):
            slurm.exclude(job_id, excluded)
            return
        time.sleep(0.3)


def _details(slurm: Slurm, job_id: str) -> dict[str, str]:
    """A controller that is busy, or is just being restarted, must not cost the run."""
    for _ in range(5):
        with suppress(UserError):
            return slurm.details(job_id)
        time.sleep(5)
    return slurm.details(job_id)


def _expand(nodelist: str) -> list[str]:
    """ "cvae-node[1-2]" → ["cvae-node1", "cvae-node2"]."""
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, capture_output=True, text=True).stdout.split() or [nodelist]


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
            f"[ $? -ne {NOT_HERE} ] || exit 0",
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
        return before(options.folder, options.care)
    if options.action == "watch":
        watch(options.folder, options.care, options.max_restarts)
    after(options.folder, options.care, options.status, options.max_restarts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
