"""A run's folder: the truth about it, from the resolved experiment to the last checkpoint."""

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cvae.config import yaml_model
from cvae.config.experiment import LONGEST_NAME, Experiment, load_experiment
from cvae.errors import UserError, cut, did_you_mean
from cvae.files import json_file, paths

LATEST = "latest"
_SUBMISSIONS = TypeAdapter(list[dict[str, Any]])
_LONGEST_NAME = 90


class RunDirectory:
    """Names the files of a run. docs/formats.md describes them."""

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.experiment_file = path / "experiment.yaml"
        self.launch_file = path / "launch.json"
        self.journal_file = path / "journal.jsonl"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.logs = path / "logs"

    @classmethod
    def create(
        cls, name: str | None, experiment: Experiment, folder: Path | None = None
    ) -> "RunDirectory":
        """Makes a new run's folder with its experiment.yaml, whole or not at all.

        name: None for the experiment's name and the time. folder: where, if not among the runs. Raises
        UserError where the name is taken or malformed, or where the folder cannot be written.
        """
        check_new_name(name)
        name = name or free_name(experiment.name)
        run = cls((folder or paths.runs_dir()) / name)
        nascent = run.path.with_name(f".{name}.{os.getpid()}.new")
        try:
            nascent.mkdir(parents=True)
            for folder in (run.checkpoints, run.pictures, run.logs):
                (nascent / folder.name).mkdir()
            text = yaml_model.dump(experiment, "The whole experiment; launch.py takes it back.")
            paths.write_atomically(nascent / run.experiment_file.name, text)
            os.rename(nascent, run.path)
        except OSError as error:
            shutil.rmtree(nascent, ignore_errors=True)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise UserError(_taken(run.path)) from None
            raise UserError(f"{run.path}: cannot be written: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, name: str) -> "RunDirectory":
        """The run of that name, of that path, or the newest one for "latest".

        Raises UserError where there is none, with the nearest name.
        """
        runs = {run.name: run for run in all_runs()}
        if name == LATEST and runs:
            return max(runs.values(), key=lambda run: run.created)
        if name in runs:
            return runs[name]
        run = cls(Path(os.path.abspath(name)))
        if os.path.isfile(run.experiment_file):
            return cls(run.path.resolve())
        near = did_you_mean(name, runs) or "; `runs.py list` shows the runs there are"
        raise UserError(f"{cut(name, 100)}: no such run in {paths.runs_dir()}{near}")

    @property
    def created(self) -> float:
        """Unix seconds; the experiment's file is written once, when the run is made. 0 if it cannot be seen."""
        try:
            return self.experiment_file.stat().st_mtime
        except OSError:
            return 0.0

    def experiment(self) -> Experiment:
        return load_experiment(self.experiment_file)

    def submissions(self) -> list[dict[str, Any]]:
        """Returns every time the run was handed to SLURM or to this machine, oldest first.

        Raises UserError if launch.json is damaged.
        """
        return json_file.load(self.launch_file, _SUBMISSIONS) or []


def all_runs() -> list[RunDirectory]:
    """Every run under home(), newest first; also those that cannot be looked into, last."""
    try:
        folders = sorted(paths.runs_dir().iterdir())
    except OSError:
        return []
    runs = [RunDirectory(folder) for folder in folders if not folder.name.startswith(".")]
    return sorted(filter(_is_run, runs), key=lambda run: run.created, reverse=True)


def _is_run(run: RunDirectory) -> bool:
    try:
        return stat.S_ISREG(run.experiment_file.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        # A link to nowhere was a run, or its experiment.
        return run.experiment_file.is_symlink() or not run.path.exists()
    except OSError:
        return True


def find_sweep(name: str) -> Path:
    """The folder of the sweep of that name, or of the newest for "latest".

    Raises UserError where there is none, with the nearest name.
    """
    made = {file.parent.name: file for file in paths.sweeps_dir().glob("[!.]*/experiment.yaml")}
    if name == LATEST and made:
        return max(made.values(), key=lambda file: file.stat().st_mtime).parent
    if name not in made:
        near = did_you_mean(name, made)
        raise UserError(f"{cut(name, 100)}: no such sweep in {paths.sweeps_dir()}{near}")
    return made[name].parent


def check_new_name(name: str | None) -> None:
    """Raises UserError where a new run cannot have that name."""
    if name is None:
        return
    whole = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)
    if not whole or len(name) > LONGEST_NAME or name == LATEST:
        raise UserError(
            f"--name {cut(name, 100)}: a run's name is letters, digits, '_', '.', '-', at most"
            f" {LONGEST_NAME} of them, and not {LATEST!r}"
        )
    if (paths.runs_dir() / name).exists():
        raise UserError(_taken(paths.runs_dir() / name))


def _taken(path: Path) -> str:
    return (
        f"run name {path.name} is taken ({path}); choose another --name, or continue that run with"
        f" `python workflows/runs.py resume {path.name}`"
    )


def telling_name(stem: str, values: Mapping[str, str]) -> str:
    """As "demo-latent_dim_64-lr_3e-4" for the keys that differ: what one reads in MLflow's list of runs."""
    parts = [f"{key.rpartition('.')[2]}_{value}" for key, value in values.items()]
    text = "-".join([stem, *parts])
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:_LONGEST_NAME].rstrip("-._")


def free_name(stem: str, folder: Path | None = None) -> str:
    """A name for a new folder: the stem and the time. folder: where it is to be; by default that of the runs."""
    folder = folder or paths.runs_dir()
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base, *(f"{base}-{n}" for n in range(2, 1000)))
    return next(name for name in names if not (folder / name).exists())
