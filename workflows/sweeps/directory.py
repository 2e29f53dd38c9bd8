"""A sweep's folder, and the list of its trials.

sweeps/<sweep>/sweep.yaml    what is searched         experiment.yaml  what all trials share
               trials.json   the state of all trials  launch.json      every submission
               ray/          Ray Tune's own state     mlflow.json      the state of the parent run
               logs/, code/  as in a run's folder
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from cvae.config import yaml_model
from cvae.config.experiment import Experiment, load_experiment
from cvae.errors import UserError
from cvae.files import json_file, paths
from cvae.run.directory import RunDirectory, find_sweep, new_folder, telling_name
from slurm import job_state
from slurm.job_state import Submission
from workflows.sweeps.sweep_file import Sweep

LISTED = "listed"
"""The key of Ray Tune's configurations that holds the values of listed keys, next to the drawn keys."""
_LONGEST_STEM = 45


@dataclass
class Trial:
    """The state of one trial, as trials.json holds it."""

    index: int
    id: str
    """Ray Tune's id."""
    run: str
    """The name of its run; of the newest one under population based training."""
    values: dict[str, Any]
    status: Literal["queued", "running", "finished", "stopped early", "failed"] = "queued"
    reason: str = ""
    """Why it failed, in one line."""
    epoch: float = 0.0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """The results of the newest evaluation."""
    best: float | None = None
    """The best value of the sweep's metric so far."""
    runs: list[str] = field(default_factory=list)
    """The names of all its runs, oldest first."""

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "stopped early", "failed")

    @property
    def run_directory(self) -> RunDirectory:
        return RunDirectory(paths.runs_dir() / self.run)

    def changes(self) -> str:
        """Returns the values that distinguish it: "optimizer.lr=0.001, seed=2"."""
        return ", ".join(f"{key}={shown(value)}" for key, value in self.values.items())


_TRIALS = TypeAdapter(list[Trial])
_LAUNCHES = TypeAdapter(list[dict[str, Any]])
_SUBMISSIONS = TypeAdapter(list[Submission])


class SweepDirectory:
    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.sweep_file = path / "sweep.yaml"
        self.experiment_file = path / "experiment.yaml"
        self.trials_file = path / "trials.json"
        self.launch_file = path / "launch.json"
        self.logs = path / "logs"
        self.ray = path / "ray"

    @classmethod
    def create(cls, name: str, sweep: Sweep, experiment: Experiment) -> "SweepDirectory":
        """Creates the folder. Raises UserError if the name is taken or the folder cannot be written."""
        created = cls(paths.sweeps_dir() / name)
        taken = UserError(f"sweep name {name} is taken ({created.path})")
        with new_folder(created.path, taken) as temporary:
            (temporary / "logs").mkdir()
            about = "sweep.py --resume goes on with it; the experiment is in experiment.yaml."
            (temporary / "sweep.yaml").write_text(yaml_model.dump(sweep, about))
            about = "What all trials of the sweep share."
            (temporary / "experiment.yaml").write_text(yaml_model.dump(experiment, about))
        return created

    @classmethod
    def open(cls, name: str) -> "SweepDirectory":
        """Returns the sweep of that name, or the newest for "latest". Raises UserError if there is none."""
        return cls(find_sweep(name))

    def sweep(self) -> Sweep:
        return yaml_model.load(self.sweep_file, Sweep)

    def experiment(self) -> Experiment:
        return load_experiment(self.experiment_file)

    def trials(self) -> list[Trial]:
        """Returns the trials in their order. Raises UserError if trials.json is damaged."""
        return json_file.load(self.trials_file, _TRIALS) or []

    def write_trials(self, trials: list[Trial]) -> None:
        json_file.save(self.trials_file, [asdict(trial) for trial in trials])

    def trials_size(self) -> int:
        """Returns the size of trials.json in bytes, 0 before the first trial."""
        return self.trials_file.stat().st_size if self.trials_file.exists() else 0

    def launches(self) -> list[dict[str, Any]]:
        """Returns the entries of launch.json, oldest first: the submissions and the sweep's own keys.

        Raises UserError if launch.json is damaged.
        """
        return json_file.load(self.launch_file, _LAUNCHES) or []

    def submissions(self) -> list[Submission]:
        """Returns every submission to SLURM or to this machine, oldest first. Raises as launches()."""
        return job_state.found_in(self.path, json_file.load(self.launch_file, _SUBMISSIONS) or [])


def run_name(sweep: str, index: int, values: Mapping[str, Any]) -> str:
    """Returns the name of a trial's run, such as "ablation-20261123-190500-07-fusion_add-seed_2"."""
    texts = {key: shown(value) for key, value in values.items()}
    return telling_name(f"{sweep[:_LONGEST_STEM]}-{index:02}", texts)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a trial's values by the experiment's keys, from Ray Tune's configuration."""
    drawn = {key: value for key, value in config.items() if key != LISTED}
    return {**dict(reversed(config.get(LISTED, {}).items())), **drawn}


def best_trial(trials: list[Trial], mode: str) -> Trial | None:
    """Returns the trial with the best value that has not failed, if any."""
    rated = [trial for trial in trials if trial.best is not None and trial.status != "failed"]
    sign = 1 if mode == "min" else -1
    return min(rated, key=lambda trial: sign * (trial.best or 0.0), default=None)
