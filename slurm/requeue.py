"""Putting a job back into SLURM's queue: asked for until SLURM has accepted it, or has refused it for good."""

import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

from cvae.errors import UserError
from slurm import attempts
from slurm.attempts import Try
from slurm.commands import Slurm, is_final

# A controller that is being restarted, or fails over to its backup, is back by then.
_PATIENCE_S = 600.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
# SLURM takes changes to a job only once its requeueing is through.
_UPDATE_PATIENCE_S = 20.0
_log = logging.getLogger("slurm.supervisor")
Answer = TypeVar("Answer")


def patiently(ask: Callable[[], Answer], patience_s: float = _PATIENCE_S) -> Answer:
    """Returns SLURM's answer; a controller that is busy or just being restarted must not cost the run.

    Raises UserError if SLURM refuses, or still does not answer after patience_s.
    """
    pause_s, deadline = _FIRST_PAUSE_S, time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except UserError as error:
            if is_final(str(error)) or time.monotonic() + pause_s > deadline:
                raise
            _log.warning("%s; asking again in %g s", error, pause_s)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def requeue(slurm: Slurm, job_id: str) -> str:
    """Returns "" once SLURM has put the job back into its queue, or SLURM's words if it refuses."""
    try:
        patiently(lambda: slurm.requeue(job_id))
    except UserError as error:
        return str(error)
    return ""


def hold_off(slurm: Slurm, job_id: str, excluded: list[str], pause_s: float) -> None:
    """Keeps a job that was just requeued away from nodes, and from starting before pause_s have passed."""
    if not excluded and not pause_s:
        return
    deadline = time.monotonic() + _UPDATE_PATIENCE_S
    while True:
        try:
            slurm.hold_off(job_id, excluded, pause_s)
        except UserError as error:
            if is_final(str(error)) or time.monotonic() > deadline:
                _log.warning("its next start cannot be put off: %s", error)
                return
            time.sleep(0.3)
        else:
            return


def nodes_to_exclude(slurm: Slurm, told: list[Try]) -> list[str]:
    """Returns the nodes on which the job failed twice, as far as it can do without them."""
    excluded: list[str] = []
    needed = int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    for node in attempts.bad_nodes(told):
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
