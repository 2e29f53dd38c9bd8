"""Submits a function as a job to SLURM or to this machine, through submitit."""

import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
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
    folder: Path  # for submitit's files and the ranks' logs; on a file system that all nodes share
    target: str  # module:function; a name, so that neither the launcher nor a pickle need import it
    arguments: tuple[Any, ...]
    env: Mapping[str, str]
    supervision: Supervision | None = None  # None: it does not restart by itself
    once_per_node: bool = False
    """Called once on every node, with all that is requested of the node, instead of once per GPU; a node that
    fails does not end the others."""
    ends_with: int | None = None
    """A process of this machine; when it ends, the job is asked to save and ends as well."""


# A line of setup that fails ends the job. Failures inside a function or a sourced file are ignored, and so is the
# status of a sourced file, which is merely that of its last command.
_CHECK_SETUP = rf"""
setup_failed() {{
  if [ "$4" -gt 1 ]; then return; fi
  case "$3" in
    "source "*|". "*) eval "set -- \"\$1\" \"\$2\" $3"; if [ -r "$4" ]; then return; fi ;;
  esac
  echo "{SETUP_ERROR}the line '$(sed -n "$2p" "$0")' failed with status $1"
  exit 1
}}
trap 'setup_failed $? $LINENO "$BASH_COMMAND" ${{#BASH_SOURCE[@]}}' ERR
""".strip().splitlines()
# If a job began without the shell's environment (NONE), SLURM_EXPORT_ENV makes srun withhold it from the ranks.
_AFTER_SETUP = ["trap - ERR", "unset SLURM_EXPORT_ENV", "CVAE_SETUP_PATH=${PYTHONPATH-}"]


def submit(job: Job, place: Place, placement: Placement, gpus: int) -> Submission:
    """Submits the job; place.config must come from cluster_file.fit() for SLURM. gpus: the requested total.

    Raises UserError if SLURM refuses the job.
    """
    started = 0.0
    if place.config.executor == "slurm":
        job_id = _submit_to_slurm(job, place.config, placement)
    else:
        job_id = _start_here(job, place.config, placement)
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


def sbatch_script(job: Job, config: ClusterConfig, placement: Placement) -> str:
    """Returns the script that submit() passes to sbatch."""
    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(job.folder)])
    parameters = _parameters(job, config, placement)
    return str(_make_sbatch_string(command=command, folder=job.folder, **parameters))


def _submit_to_slurm(job: Job, config: ClusterConfig, placement: Placement) -> str:
    executor = submitit.SlurmExecutor(job.folder)
    executor.update_parameters(**_parameters(job, config, placement))
    secrets = _secrets(job, config)
    environment = {**config.slurm().environment, **job.env, **secrets, **_let_through(secrets)}
    # Within another job, that job's variables would shape this one.
    outside: Any = clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext()
    try:
        with outside, environment_variables(**environment):
            return str(executor.submit(rank_process.run, job.target, *job.arguments).job_id)
    except FailedJobError as error:
        raise UserError(f"SLURM says: {complaint(str(error))}") from None


def _parameters(job: Job, config: ClusterConfig, placement: Placement) -> dict[str, Any]:
    ranks = placement.ranks_per_node
    tasks = 1 if job.once_per_node else ranks
    cpus_per_task = (config.cpus_per_gpu or 1) * ranks // tasks
    memory = f"{config.mem_per_gpu_gb * ranks}G" if config.mem_per_gpu_gb else None
    gpu_type = f"{config.gpu_type}:" if config.gpu_type else ""
    # A site may not requeue jobs by default.
    options: dict[str, Any] = {"chdir": str(job.folder), "requeue": True}
    bad_exit = ["--kill-on-bad-exit=1"]
    if job.once_per_node:
        options["no_kill"] = True
        # The failure of a node must not end the others, even if the site sets KillOnBadExit and WaitTime.
        bad_exit = ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"]
    before: list[str] = []
    after: list[str] = []
    if job.supervision is not None:
        before, after = supervisor.script_lines(job.folder, job.supervision, config.max_restarts)
    return {
        "job_name": job.name,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "nodes": placement.nodes,
        "ntasks_per_node": tasks,
        # Each rank sees all GPUs of its job on its node and takes the one of its local rank: GPUs that are hidden
        # from each other cannot communicate over NVLink.
        "gpus_per_node": f"{gpu_type}{ranks}",
        "cpus_per_task": cpus_per_task,
        "mem": memory,
        "time": config.time_limit_min or 0,  # 0: no limit
        "signal_delay_s": config.grace_s,
        "exclusive": config.exclusive or None,
        "setup": _setup(job, config, placement) + before,
        "teardown": after or None,
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": options,
        # Since SLURM 22.05 srun ignores the --cpus-per-task of sbatch.
        "srun_args": [f"--cpus-per-task={cpus_per_task}", *bad_exit],
    }


def _setup(job: Job, config: ClusterConfig, placement: Placement) -> list[str]:
    env = {**config.slurm().environment, **_environment(job, config, placement.nodes)}
    secrets = _secrets(job, config)
    exports = [
        f"export {key}={shlex.quote(value)}" for key, value in env.items() if key not in secrets
    ]
    # Before setup, which may use them, and after it, which must not override them.
    lines = ["unset MASTER_ADDR MASTER_PORT", *exports]
    lines += [*_CHECK_SETUP, *config.setup, *_AFTER_SETUP, *exports]
    if "PYTHONPATH" in env:
        # What modules have added stays, behind the job's own code.
        lines.append('export PYTHONPATH="$PYTHONPATH${CVAE_SETUP_PATH:+:$CVAE_SETUP_PATH}"')
    return lines


def _environment(job: Job, config: ClusterConfig, nodes: int = 1) -> dict[str, str]:
    env = {**config.patience(nodes), **job.env, **config.env}
    # The job's own code comes before what the cluster file adds.
    search = [one["PYTHONPATH"] for one in (job.env, config.env) if "PYTHONPATH" in one]
    return {**env, "PYTHONPATH": os.pathsep.join(search)} if search else env


def _secrets(job: Job, config: ClusterConfig) -> dict[str, str]:
    """Returns the variables that contain a password.

    sbatch passes the environment on, while a script can be read by everybody.
    """
    env = _environment(job, config)
    return {key: value for key, value in env.items() if holds_password(key, value)}


def _let_through(secrets: Mapping[str, str]) -> dict[str, str]:
    """Returns SBATCH_EXPORT with the secrets' names, if a person's own setting would withhold them."""
    chosen = os.environ.get("SBATCH_EXPORT", "ALL").split(",")
    if not secrets or "ALL" in map(str.upper, chosen):
        return {}
    names = [name for name in chosen if name.upper() not in ("NONE", "NIL")]
    return {"SBATCH_EXPORT": ",".join([*names, *secrets])}


def _start_here(job: Job, config: ClusterConfig, placement: Placement) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**_environment(job, config), "CVAE_MASTER_PORT": str(port)}
    if job.ends_with is not None:
        env["CVAE_ENDS_WITH"] = str(job.ends_with)
    executor = local_jobs.DetachedExecutor(job.folder)
    executor.update_parameters(
        tasks_per_node=1 if job.once_per_node else placement.world_size,
        env=env,
        supervision=job.supervision,
        max_restarts=config.max_restarts,
    )
    return str(executor.submit(rank_process.run, job.target, *job.arguments).job_id)
