"""What runs on the node, in every rank: any function, told its rank in torch's own words."""

import faulthandler
import importlib
import json
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import submitit

from cvae.errors import UserError, in_words
from cvae.files.paths import write_atomically
from slurm import attempts

# The other ranks end after rank 0: where one rank's bad end makes SLURM kill the rest, rank 0 has then
# written down why.
_LEAD_OF_FIRST_RANK_S = 5.0


def run(target: str, *arguments: Any) -> None:
    """Calls ``module:function`` in this rank. Nothing is returned, so nothing is pickled.

    A UserError becomes a line in the log and exit status 2, another exception a traceback and status 1. The
    status, reason and signals of the result are reported to the supervisor; "failed" makes rank 0's exit
    status 1, for SLURM's accounting. A function that has to end its process at once may leave the reason in the
    file that $CVAE_FAILURE_FILE names.
    """
    faulthandler.enable()  # a segmentation fault leaves every thread's stack in the log
    # submitit has bound SIGUSR2 to its own requeueing and SIGTERM to nothing. Until the function binds
    # them itself, there is nothing to save: die.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("submitit").propagate = False  # it prints for itself
    environment = submitit.JobEnvironment()
    rank = export_ranks(environment)
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    failure = attempts.failure_file(folder, environment.job_id, rank)
    result_file = attempts.result_file(folder, environment.job_id)
    for file in [failure] + [result_file] * (rank == 0):
        file.unlink(missing_ok=True)  # of an earlier try of a job that was requeued
    os.environ["CVAE_FAILURE_FILE"] = str(failure)
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        os.environ["CVAE_RESTARTED"] = "1"
    try:
        module, _, name = target.partition(":")
        result = getattr(importlib.import_module(module), name)(*arguments)
    except Exception as error:
        _fail(rank, error, failure)
    status = getattr(result, "status", None)
    if rank == 0 and status is not None:
        report = {"status": status, "reason": getattr(result, "reason", "")}
        report["signals"] = list(getattr(result, "signals", ()))
        write_atomically(result_file, json.dumps(report))
        if status == "failed":
            sys.exit(1)


def export_ranks(job: Any) -> int:
    """Sets the environment variables of torch.distributed from submitit's; returns the rank.

    CUDA_VISIBLE_DEVICES stays as the cluster has set it: where it binds one GPU to each task, the local
    rank is not a GPU's number.
    """
    local = job.cluster == "local"
    variables = {
        "RANK": job.global_rank,
        "LOCAL_RANK": job.local_rank,
        "WORLD_SIZE": job.num_tasks,
        "LOCAL_WORLD_SIZE": job.num_tasks // job.num_nodes,
    }
    if local:
        os.environ.pop("CVAE_CORES", None)  # of a sweep's allocation
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["CVAE_MASTER_PORT"]}
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        # The batch script forgets what it inherits: these are the cluster file's.
        variables["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or job.hostnames[0]
        # Below the range that kernels give out by themselves; jobs that share a host differ in their id.
        port = 10000 + int(job.job_id) % 20000
        variables["MASTER_PORT"] = os.environ.get("MASTER_PORT") or port
        variables["CVAE_CORES"] = _cores(job.num_tasks // job.num_nodes)
    os.environ.update({key: str(value) for key, value in variables.items()})
    return int(job.global_rank)


def _cores(tasks: int) -> int:
    """Returns how many cores are this task's own, of `tasks` on this host."""
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():
        cores //= tasks  # SLURM has bound the task to none of them
    # Bound to its job's cores instead of its own, a task still has no more than it asked for.
    return max(1, min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores)))


def _fail(rank: int, error: Exception, file: Path) -> NoReturn:
    """Leaves the evidence beside the logs and ends this rank."""
    if isinstance(error, UserError):
        message, status = " ".join(str(error).split()), 2
        print(f"error: {message}", flush=True)
    else:
        message, status = in_words(error), 1
        logging.getLogger(__name__).error("rank %d failed", rank, exc_info=error)
    report = {"time": time.time(), "rank": rank, "host": socket.gethostname(), "error": message}
    with suppress(OSError):
        file.write_text(json.dumps({**report, "bad_input": isinstance(error, UserError)}))
    if rank != 0:
        time.sleep(_LEAD_OF_FIRST_RANK_S)
    sys.exit(status)
