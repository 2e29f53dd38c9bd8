"""Submits a sweep to SLURM or to this machine."""

import os
from pathlib import Path
from typing import NamedTuple

from cvae.data.experiment_data import open_data
from cvae.errors import UserError
from cvae.files import json_file, paths
from cvae.run import code_snapshot
from cvae.run.code_snapshot import CodeSnapshot
from slurm import executors, job_state, ray_cluster
from slurm.cluster_file import Place, Placement, count
from slurm.executors import Job
from slurm.supervision import Supervision
from workflows.jobs.run_facts import open_mlflow
from workflows.jobs.submission import interrupts_wait, job_environment
from workflows.sweeps.directory import SweepDirectory, shown
from workflows.sweeps.sweep_file import LoadedSweep, Space
from workflows.terminal.formatting import Fact
from workflows.terminal.formatting import shown as shown_path


class Allocation(NamedTuple):
    """Where a sweep runs, and how its GPUs (or cores) are divided among trials."""

    place: Place
    placement: Placement
    gpus_per_trial: float
    address: str | None = None
    """A Ray cluster that is running already; the placement is then only the driver's."""

    @property
    def slots(self) -> int:
        """How many trials fit at once; a trial does not extend over nodes."""
        return self.placement.nodes * self.slots_per_node

    @property
    def slots_per_node(self) -> int:
        return int(self.placement.ranks_per_node / self.gpus_per_trial + 1e-9)

    def check(self, has_gpus: bool) -> None:
        """Raises UserError if a trial has no room on a node, or would share a core."""
        option, gpus = f"--gpus-per-trial {self.gpus_per_trial:g}", self.placement.ranks_per_node
        if self.gpus_per_trial > 1 and self.gpus_per_trial != int(self.gpus_per_trial):
            raise UserError(f"{option}: a part of one GPU, or whole ones")
        if self.gpus_per_trial < 1 and not has_gpus:
            raise UserError(f"{option}: there are no GPUs here that could be shared")
        if self.slots_per_node < 1:
            raise UserError(f"{option}: a node gives {gpus}, and a trial is on one")


def plan_facts(loaded: LoadedSweep, allocation: Allocation, name: str) -> list[Fact]:
    """Returns what the sweep is going to do. Raises UserError if the data are not prepared."""
    sweep, experiment = loaded.sweep, loaded.experiment
    steps = experiment.total_steps(len(open_data(experiment).train_rows))
    trials = f"{sweep.n_trials:,} ({sweep.search.name})"
    if loaded.impossible:
        more = f", and {len(loaded.impossible) - 1} more" if len(loaded.impossible) > 1 else ""
        trials += f"\nsome combinations are impossible and will fail: {loaded.impossible[0]}{more}"
    trial = f"epochs {shown(experiment.training.epochs)}, {count(steps, 'step')} without the space's keys"
    at_once = min(sweep.concurrency or allocation.slots, allocation.slots)
    has_scheduler = sweep.scheduler.name != "none"
    return [
        ("space", "\n".join(_in_words(key, space) for key, space in sweep.space.items())),
        ("trials", trials),
        ("judged by", f"{sweep.metric}, the {sweep.mode}imum over a trial's evaluations"),
        *([("scheduler", sweep.scheduler.name)] if has_scheduler else []),
        ("each trial", f"{trial}; {allocation.gpus_per_trial:g} of a node's slots"),
        ("at once", count(at_once, "trial")),
        *([("budget", f"{sweep.hours:g} h")] if sweep.hours else []),
        ("sweep folder", shown_path(paths.sweeps_dir() / name)),
        ("MLflow", open_mlflow()),
    ]


def _in_words(key: str, space: Space) -> str:
    values = getattr(space, space.kind)
    text = ", ".join(map(shown, values)) if isinstance(values, list | tuple) else str(values)
    return f"{key}: {text}" if space.kind == "grid" else f"{key}: {space.kind} {text}"


def submit(sweep: SweepDirectory, allocation: Allocation) -> None:
    """Submits the sweep and records that in launch.json. Raises UserError if SLURM refuses the job."""
    code = CodeSnapshot().write()
    code_snapshot.link(sweep.path, code)
    job = _job_of(sweep, allocation, code)
    place, placement = allocation.place, allocation.placement
    with interrupts_wait():
        submission = executors.submit(job, place, placement, placement.world_size)
        entry = {
            **submission.model_dump(),
            "code": code.name,
            "folder": os.path.realpath(sweep.path),
            "gpus_per_trial": allocation.gpus_per_trial,
            "address": allocation.address,
        }
        try:
            json_file.save(sweep.launch_file, [*sweep.launches(), entry])
        except OSError:
            # A job that is not recorded could not be followed or cancelled.
            job_state.end(submission, 0, lambda _: None)
            raise


def _job_of(sweep: SweepDirectory, allocation: Allocation, code: Path) -> Job:
    address, folder = allocation.address, str(sweep.path)
    slots = [str(allocation.slots_per_node), str(allocation.gpus_per_trial)]
    driver = ["workflows.sweeps.driver", folder, *slots]
    mirror = ["workflows.sweeps.mirror", folder]
    environment = job_environment(code)
    if address is None and sweep.path.exists():
        environment |= ray_cluster.write_token(sweep.path)
    return Job(
        sweep.name,
        sweep.logs,
        "slurm.ray_cluster:run",
        (sweep.path, driver, allocation.placement.ranks_per_node, address, mirror),
        environment,
        Supervision(f"{folder}/progress-*"),
        once_per_node=True,
    )


def sbatch_script(name: str, allocation: Allocation) -> str | None:
    """Returns the batch script that submit() would submit; None on this machine."""
    if allocation.place.config.executor != "slurm":
        return None
    job = _job_of(SweepDirectory(paths.sweeps_dir() / name), allocation, CodeSnapshot().path)
    return executors.sbatch_script(job, allocation.place.config, allocation.placement)
