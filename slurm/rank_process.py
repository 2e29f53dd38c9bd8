"""Runs in every rank on its node: calls any function with torch's environment variables set."""

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

# If the failure of one rank makes SLURM kill the others, rank 0 has recorded the reason by then.
_LEAD_OF_FIRST_RANK_S = 5.0


def run(target: str, *arguments: Any) -> None:
    """Calls ``module:function`` in this rank. Nothing is returned, so nothing is pickled.

    A UserError becomes a line in the log and exit status 2, another exception a traceback and status 1. The
    status, reason and signals of the result are reported to the supervisor; "failed" makes rank 0's exit
    status 1, for SLURM's accounting. A function that has to end its process at once may leave the reason in the
    file that $CVAE_FAILURE_FILE names.
    """
    faulthandler.enable()  # a segmentation fault leaves every thread's stack in the log
    # submitit binds SIGUSR2 to its own requeueing and SIGTERM to nothing. Until the function binds them, there is
    # nothing to save.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("submitit").propagate = False  # it prints by itself
    environment = submitit.JobEnvironment()
    rank = export_ranks(environment)
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    failure = attempts.failure_file(folder, environment.job_id, rank)
    result_file = attempts.result_file(folder, environment.job_id)
    for file in [failure] + [result_file] * (rank == 0):
        file.unlink(missing_ok=True)  # of an earlier attempt
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
    """Sets the environment variables of torch.distributed from those of submitit; returns the rank.

    CUDA_VISIBLE_DEVICES stays as the cluster has set it: if it binds one GPU to each task, the local rank is not
    the number of a GPU.
    """
    variables = {
        "RANK": job.global_rank,
        "LOCAL_RANK": job.local_rank,
        "WORLD_SIZE": job.num_tasks,
        "LOCAL_WORLD_SIZE": job.num_tasks // job.num_nodes,
    }
    if job.cluster == "local":
        os.environ.pop("CVAE_CORES", None)  # of a sweep's allocation
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ["CVAE_MASTER_PORT"]}
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        # Those that are set come from the cluster file: the batch script unsets what it inherits.
        variables["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or job.hostnames[0]
        # Below the range of ephemeral ports; jobs that share a host differ in their id.
        port = 10000 + int(job.job_id) % 20000
        variables["MASTER_PORT"] = os.environ.get("MASTER_PORT") or port
        variables["CVAE_CORES"] = _cores(job.num_tasks // job.num_nodes)
    os.environ.update({key: str(value) for key, value in variables.items()})
    return int(job.global_rank)


def _cores(tasks: int) -> int:
    """Returns how many cores this task may use, as one of `tasks` on this host."""
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():
        cores //= tasks  # SLURM has bound the task to none of them
    # A task that is bound to the cores of its whole job still has no more than it requested.
    return max(1, min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK") or cores)))


def _fail(rank: int, error: Exception, file: Path) -> NoReturn:
    """Reports the exception to the supervisor and ends this rank."""
    bad_input = isinstance(error, UserError)
    if bad_input:
        message = " ".join(str(error).split())
        print(f"error: {message}", flush=True)
    else:
        message = in_words(error)
        logging.getLogger(__name__).error("rank %d failed", rank, exc_info=error)
    report = {"time": time.time(), "rank": rank, "host": socket.gethostname(), "error": message}
    with suppress(OSError):
        file.write_text(json.dumps({**report, "bad_input": bad_input}))
    if rank != 0:
        time.sleep(_LEAD_OF_FIRST_RANK_S)
    sys.exit(2 if bad_input else 1)
