"""A sweep's folder, and the list of its trials as it stands there.

sweeps/<sweep>/sweep.yaml        what is searched      experiment.yaml   what all trials share
               trials.json       every trial: its run, changed keys, how far it has come, how it ended
               launch.json       every submission      logs/, code/      as in a run's folder
               ray/              Ray Tune's own state  mlflow.json       the parent run
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from cvae.config import yaml_model
from cvae.config.experiment import Experiment, load_experiment
from cvae.errors import UserError
from cvae.files import json_file, paths
from cvae.run.directory import RunDirectory, find_sweep, telling_name
from slurm import job_state
from slurm.job_state import Submission
from workflows.sweeps.sweep_file import Sweep

# In Ray Tune's configurations: the values of the listed keys; the drawn keys stand beside it.
LISTED = "listed"
Status = Literal["queued", "running", "finished", "stopped early", "failed"]
_LONGEST_STEM = 45


@dataclass
class Trial:
    index: int
    id: str
    """Ray Tune's."""
    run: str
    """The name of its run; under population based training of the newest of them."""
    values: dict[str, Any]
    status: Status = "queued"
    reason: str = ""
    """Of a failure, in one line."""
    epoch: float = 0.0
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the newest evaluation."""
    best: float | None = None
    """The best value of the sweep's metric so far."""
    runs: list[str] = field(default_factory=list)
    """All its runs, oldest first."""

    @property
    def ended(self) -> bool:
        return self.status in ("finished", "stopped early", "failed")


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
        """Whole or not at all. Raises UserError where the name is taken or the folder cannot be written."""
        made = cls(paths.sweeps_dir() / name)
        nascent = made.path.with_name(f".{name}.{os.getpid()}.new")
        try:
            (nascent / "logs").mkdir(parents=True)
            says = "sweep.py --resume goes on with it; the experiment is in experiment.yaml."
            (nascent / "sweep.yaml").write_text(yaml_model.dump(sweep, says))
            says = "What all trials of the sweep share."
            (nascent / "experiment.yaml").write_text(yaml_model.dump(experiment, says))
            os.rename(nascent, made.path)
        except OSError as error:
            shutil.rmtree(nascent, ignore_errors=True)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise UserError(f"sweep name {name} is taken ({made.path})") from None
            raise UserError(f"{made.path}: cannot be written: {error.strerror}") from None
        return made

    @classmethod
    def open(cls, name: str) -> "SweepDirectory":
        """The sweep of that name, or the newest for "latest". Raises UserError with the nearest name."""
        return cls(find_sweep(name))

    def sweep(self) -> Sweep:
        return yaml_model.load(self.sweep_file, Sweep)

    def experiment(self) -> Experiment:
        return load_experiment(self.experiment_file)

    def trials(self) -> list[Trial]:
        """As they stand, in their order; empty before the first. Raises UserError if trials.json is damaged."""
        return json_file.load(self.trials_file, _TRIALS) or []

    def write_trials(self, trials: list[Trial]) -> None:
        text = json.dumps([asdict(trial) for trial in trials], indent=1)
        paths.write_atomically(self.trials_file, text + "\n")

    def launches(self) -> list[dict[str, Any]]:
        """Every time the sweep was handed to SLURM or to this machine, oldest first.

        Raises UserError if launch.json is damaged.
        """
        return json_file.load(self.launch_file, _LAUNCHES) or []

    def submissions(self) -> list[Submission]:
        return job_state.found_in(self.path, json_file.load(self.launch_file, _SUBMISSIONS) or [])


def run_name(sweep: str, index: int, values: Mapping[str, Any]) -> str:
    """As "ablation-20261123-190500-07-fusion_add-seed_2": a trial, and its values."""
    values = {key: shown(value) for key, value in values.items()}
    return telling_name(f"{sweep[:_LONGEST_STEM]}-{index:02}", values)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def values_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values, by the experiment's keys, from Ray Tune's configuration."""
    drawn = {key: value for key, value in config.items() if key != LISTED}
    listed = dict(config.get(LISTED, {}))
    return {**dict(reversed(listed.items())), **drawn}


def best_trial(trials: list[Trial], mode: str) -> Trial | None:
    """The one with the best value; failed ones never."""
    rated = [trial for trial in trials if trial.best is not None and trial.status != "failed"]
    sign = 1 if mode == "min" else -1
    return min(rated, key=lambda trial: sign * (trial.best or 0.0), default=None)


def run_of(trial: Trial) -> RunDirectory:
    return RunDirectory(paths.runs_dir() / trial.run)
