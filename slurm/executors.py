"""Hands a function to SLURM or to this machine, through submitit."""

import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import submitit
from submitit.core.utils import FailedJobError, environment_variables
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string

from cvae.errors import UserError
from cvae.redaction import holds_password
from slurm import local_jobs, rank_process, supervisor
from slurm.cluster_file import ClusterConfig, Place, Placement
from slurm.commands import complaint
from slurm.failure_diagnosis import SETUP_ERROR
from slurm.job_state import Submission, this_machine
from slurm.supervision import Supervision


class Job(NamedTuple):
    """A function to be called once in every rank."""

    name: str
    folder: Path
    """For submitit's files and the ranks' logs; on a file system that all nodes share."""
    target: str
    """module:function; named, so that neither the launcher nor a pickle need import it."""
    arguments: tuple[Any, ...]
    env: Mapping[str, str]
    supervision: Supervision | None = None
    """None: it does not restart by itself."""
    once_per_node: bool = False
    """Called once on every node, with all that is asked for of the node, instead of once per GPU; a node that
    fails does not end the others."""
    ends_with: int | None = None
    """A process of this machine that the job does not outlive: it is then told to save."""


# A line of setup that fails ends the job. What fails inside of a function or a sourced file is that one's own
# affair; so is a sourced file's status, which is that of its last command.
_CHECK_SETUP = (
    r"""
setup_failed() {
  if [ "$4" -gt 1 ]; then return; fi
  case "$3" in
    "source "*|". "*) eval "set -- \"\$1\" \"\$2\" $3"; if [ -r "$4" ]; then return; fi ;;
  esac
  echo "SETUP_ERRORthe line '$(sed -n "$2p" "$0")' failed with status $1"
  exit 1
}
trap 'setup_failed $? $LINENO "$BASH_COMMAND" ${#BASH_SOURCE[@]}' ERR
""".strip()
    .replace("SETUP_ERROR", SETUP_ERROR)
    .splitlines()
)
# A job that began without the shell's environment (NONE) has srun withhold these variables from the ranks.
_AFTER_SETUP = ["trap - ERR", "unset SLURM_EXPORT_ENV", "CVAE_SETUP_PATH=${PYTHONPATH-}"]


def submit(what: Job, place: Place, placement: Placement, gpus: int) -> Submission:
    """place.config: for SLURM as cluster.fit() gave it back. gpus: what was asked for.

    Raises UserError where SLURM refuses the job.
    """
    started = 0.0
    if place.config.executor == "slurm":
        job_id = _to_slurm(what, place.config, placement)
    else:
        job_id = _to_this_machine(what, place.config, placement)
        started = local_jobs.started_at(local_jobs.pid_of(job_id))
    return Submission(
        time=time.time(),
        cluster=place.name,
        executor=place.config.executor,
        job_id=job_id,
        host=socket.gethostname(),
        machine=this_machine(),
        nodes=placement.nodes,
        gpus=gpus,
        world_size=placement.world_size,
        slurm_conf=place.config.slurm_conf,
        process_started=started,
        command=shlex.join(sys.argv),
    )


def sbatch_script(what: Job, config: ClusterConfig, placement: Placement) -> str:
    """The script that submit() hands to sbatch."""
    command = shlex.join([sys.executable, *["-u", "-m", "submitit.core._submit"], str(what.folder)])
    text: str = _make_sbatch_string(
        command=command, folder=what.folder, **_parameters(what, config, placement)
    )
    return text


def _to_slurm(what: Job, config: ClusterConfig, placement: Placement) -> str:
    executor = submitit.SlurmExecutor(what.folder)
    executor.update_parameters(**_parameters(what, config, placement))
    # From within another job, its variables would shape this one.
    inside: AbstractContextManager[Any] = (
        clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    )
    secrets = _secrets(what, config)
    environment = {**config.slurm().environment, **what.env, **secrets, **_let_through(secrets)}
    try:
        with inside, environment_variables(**environment):
            return str(executor.submit(rank_process.run, what.target, *what.arguments).job_id)
    except FailedJobError as error:
        raise UserError(f"SLURM says: {complaint(str(error))}") from None


def _parameters(what: Job, config: ClusterConfig, placement: Placement) -> dict[str, Any]:
    env = {**config.slurm().environment, **_environment(what, config, placement.nodes)}
    before: list[str] = []
    after: list[str] = []
    if what.supervision is not None:
        before, after = supervisor.script_lines(what.folder, what.supervision, config.max_restarts)
    secrets = _secrets(what, config)
    exports = [
        f"export {key}={shlex.quote(value)}" for key, value in env.items() if key not in secrets
    ]
    # Before setup, which may use them, and after it, which must not override them.
    setup = ["unset MASTER_ADDR MASTER_PORT", *exports]
    setup += [*_CHECK_SETUP, *config.setup, *_AFTER_SETUP, *exports]
    if "PYTHONPATH" in env:
        # What modules have added stays, behind the job's own code.
        setup.append('export PYTHONPATH="$PYTHONPATH${CVAE_SETUP_PATH:+:$CVAE_SETUP_PATH}"')
    # Each rank sees all GPUs of its job on its node and takes the one of its local rank: GPUs that are
    # hidden from each other cannot talk over NVLink.
    gpus = f"{config.gpu_type}:" if config.gpu_type else ""
    cpus = config.cpus_per_gpu or 1
    memory = (
        f"{config.mem_per_gpu_gb * placement.ranks_per_node}G" if config.mem_per_gpu_gb else None
    )
    ranks = placement.ranks_per_node
    tasks = 1 if what.once_per_node else ranks
    flags: dict[str, bool] = {"no_kill": True} if what.once_per_node else {}
    # One node's bad end is not the others', whatever the site's own KillOnBadExit and WaitTime.
    apart = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
    bad_exit = apart if what.once_per_node else ["--kill-on-bad-exit=1"]
    return {
        "job_name": what.name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "nodes": placement.nodes,
        "ntasks_per_node": tasks,
        "gpus_per_node": f"{gpus}{ranks}",
        "cpus_per_task": cpus * ranks // tasks,
        "mem": memory,
        "time": config.time_limit_min or 0,  # 0: no limit
        "signal_delay_s": config.grace_s,
        "exclusive": True if config.exclusive else None,
        "setup": setup + before,
        "teardown": after or None,
        "stderr_to_stdout": True,
        "wckey": None,
        # A site may have turned requeueing off for those who do not ask for it.
        "additional_parameters": {"chdir": str(what.folder), "requeue": True, **flags},
        # Since SLURM 22.05 srun does not take over sbatch's --cpus-per-task.
        "srun_args": [f"--cpus-per-task={cpus * ranks // tasks}", *bad_exit],
    }


def _environment(what: Job, config: ClusterConfig, nodes: int = 1) -> dict[str, str]:
    env = {**config.patience(nodes), **what.env, **config.env}
    search = [
        variables["PYTHONPATH"] for variables in (what.env, config.env) if "PYTHONPATH" in variables
    ]
    if search:
        # The job's own code comes before what the cluster file adds.
        env["PYTHONPATH"] = os.pathsep.join(search)
    return env


def _secrets(what: Job, config: ClusterConfig) -> dict[str, str]:
    """Variables with a password in them: sbatch hands on the environment, a script could be read by everybody."""
    env = _environment(what, config)
    return {key: value for key, value in env.items() if holds_password(key, value)}


def _let_through(secrets: Mapping[str, str]) -> dict[str, str]:
    """Returns SBATCH_EXPORT with the secrets' names, if sbatch would withhold them as a person has set it."""
    chosen = os.environ.get("SBATCH_EXPORT", "ALL").split(",")
    if not secrets or "ALL" in map(str.upper, chosen):
        return {}
    named = [name for name in chosen if name.upper() not in ("NONE", "NIL")]
    return {"SBATCH_EXPORT": ",".join([*named, *secrets])}


def _to_this_machine(what: Job, config: ClusterConfig, placement: Placement) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    executor = local_jobs.DetachedExecutor(what.folder)
    env = {**_environment(what, config), "CVAE_MASTER_PORT": str(port)}
    if what.ends_with is not None:
        env["CVAE_ENDS_WITH"] = str(what.ends_with)
    executor.update_parameters(
        tasks_per_node=1 if what.once_per_node else placement.world_size,
        env=env,
        supervision=what.supervision,
        max_restarts=config.max_restarts,
    )
    return str(executor.submit(rank_process.run, what.target, *what.arguments).job_id)
