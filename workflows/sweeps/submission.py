"""Handing a sweep to SLURM or to this machine: what runs where, said beforehand and written down."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from cvae.data.experiment_data import open_data
from cvae.errors import UserError
from cvae.files import paths
from cvae.run import code_snapshot
from cvae.run.code_snapshot import CodeSnapshot
from slurm import executors, job_state, ray_cluster
from slurm.cluster_file import Place, Placement, count
from slurm.executors import Job
from slurm.job_state import Submission
from slurm.supervision import Supervision
from workflows.jobs.run_facts import open_mlflow
from workflows.jobs.submission import interrupts_wait, job_environment
from workflows.sweeps.directory import SweepDirectory, shown
from workflows.sweeps.sweep_file import Loaded, Space
from workflows.terminal.formatting import Fact
from workflows.terminal.formatting import shown as shown_path


class Seats(NamedTuple):
    """Where the trials sit."""

    place: Place
    placement: Placement
    gpus_per_trial: float

    @property
    def slots(self) -> int:
        """Trials at once; a trial is on one node."""
        return self.placement.nodes * self.slots_per_node

    @property
    def slots_per_node(self) -> int:
        return int(self.placement.ranks_per_node / self.gpus_per_trial + 1e-9)


def check_seats(seats: Seats, gpus: bool) -> None:
    """gpus: whether there are any; cores are not shared. Raises UserError where no trial has room."""
    share, there = seats.gpus_per_trial, seats.placement.ranks_per_node
    if share > 1 and share != int(share):
        raise UserError(f"--gpus-per-trial {share:g}: a part of one GPU, or whole ones")
    if share < 1 and not gpus:
        raise UserError(f"--gpus-per-trial {share:g}: there are no GPUs here that could be shared")
    if seats.slots_per_node < 1:
        raise UserError(f"--gpus-per-trial {share:g}: a node gives {there}, and a trial is on one")


def facts_of(loaded: Loaded, seats: Seats, name: str) -> list[Fact]:
    """What the sweep is going to do. Raises UserError where the data are not prepared."""
    sweep, experiment = loaded.sweep, loaded.experiment
    data = open_data(experiment)
    steps = experiment.total_steps(len(data.train_rows))
    facts: list[Fact] = [("space", "\n".join(_space(key, x) for key, x in sweep.space.items()))]
    facts.append(("trials", _trials(loaded)))
    facts.append(("judged by", f"{sweep.metric}, the {sweep.mode}imum over a trial's evaluations"))
    if sweep.scheduler.name != "none":
        facts.append(("scheduler", sweep.scheduler.name))
    epochs = f"epochs {shown(experiment.training.epochs)}"
    each = f"{epochs}, {count(steps, 'step')} as the experiment stands"
    facts.append(("each trial", f"{each}; {seats.gpus_per_trial:g} of a node's slots"))
    at_once = min(sweep.concurrency or seats.slots, seats.slots)
    facts.append(("at once", count(at_once, "trial")))
    if sweep.hours:
        facts.append(("budget", f"{sweep.hours:g} h"))
    facts.append(("sweep folder", shown_path(paths.sweeps_dir() / name)))
    facts.append(("MLflow", open_mlflow()))
    return facts


def _space(key: str, space: Space) -> str:
    kind, value = space.kind, getattr(space, space.kind)
    text = ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)
    return f"{key}: {text}" if kind == "grid" else f"{key}: {kind} {text}"


def _trials(loaded: Loaded) -> str:
    search = loaded.sweep.search
    text = f"{loaded.sweep.n_trials:,} ({search.name})"
    if loaded.impossible:
        more = f", and {len(loaded.impossible) - 1} more" if len(loaded.impossible) > 1 else ""
        text += f"\nsome combinations are impossible and will fail: {loaded.impossible[0]}{more}"
    return text


def submit(sweep: SweepDirectory, seats: Seats, address: str | None) -> Submission:
    """Raises UserError where SLURM refuses the job."""
    code = CodeSnapshot().write()
    code_snapshot.link(sweep.path, code)
    job = job_of(sweep, seats, address, code)
    with interrupts_wait():
        submission = executors.submit(job, seats.place, seats.placement, seats.placement.world_size)
        more = {"code": code.name, "folder": os.path.realpath(sweep.path)}
        submission = submission.model_copy(update=more)
        try:
            _write(sweep, submission, seats, address)
        except OSError:
            job_state.end(submission, 0, lambda _: None)
            raise
    return submission


def job_of(sweep: SweepDirectory, seats: Seats, address: str | None, code: Path) -> Job:
    driver = ["workflows.sweeps.driver", str(sweep.path), str(seats.slots_per_node)]
    driver.append(str(seats.gpus_per_trial))
    beside = ["workflows.sweeps.mirror", str(sweep.path)]
    arguments = (sweep.path, driver, seats.placement.ranks_per_node, address, beside)
    environment = job_environment(code)
    if address is None:
        environment |= ray_cluster.write_token(sweep.path) if sweep.path.exists() else {}
    supervision = Supervision(str(sweep.path / "progress-*"))
    target = "slurm.ray_cluster:run"
    return Job(
        sweep.name, sweep.logs, target, arguments, environment, supervision, once_per_node=True
    )


def sbatch_script(name: str, seats: Seats) -> str | None:
    """What submit() would hand to sbatch; None where that is not SLURM."""
    if seats.place.config.executor != "slurm":
        return None
    job = job_of(SweepDirectory(paths.sweeps_dir() / name), seats, None, CodeSnapshot().path)
    return executors.sbatch_script(job, seats.place.config, seats.placement)


def _write(
    sweep: SweepDirectory, submission: Submission, seats: Seats, address: str | None
) -> None:
    more = {"gpus_per_trial": seats.gpus_per_trial, "address": address}
    entry = {**submission.model_dump(), **more}
    text = json.dumps([*sweep.launches(), entry], indent=1)
    paths.write_atomically(sweep.launch_file, text + "\n")
