"""A run's folder, which holds everything about it: docs/formats.md describes the files."""

import errno
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from cvae.config import yaml_model
from cvae.config.experiment import LONGEST_NAME, Experiment, load_experiment
from cvae.errors import UserError, cut, did_you_mean
from cvae.files import json_file, paths

LATEST = "latest"
_SUBMISSIONS = TypeAdapter(list[dict[str, Any]])
_LONGEST_NAME_WITH_VALUES = 90


class RunDirectory:
    """The paths of a run's files, and access to those that describe it."""

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
        """Creates the folder of a new run with its experiment.yaml, whole or not at all.

        name: by default the experiment's name and the time. folder: the parent, by default that of
        all runs. Raises UserError if the name is malformed or taken or the folder cannot be written.
        """
        check_new_name(name)
        run = cls((folder or paths.runs_dir()) / (name or free_name(experiment.name)))
        with new_folder(run.path, _taken(run.path)) as temporary:
            for empty in (run.checkpoints, run.pictures, run.logs):
                (temporary / empty.name).mkdir()
            text = yaml_model.dump(experiment, "The whole experiment; launch.py takes it back.")
            paths.write_atomically(temporary / run.experiment_file.name, text)
        return run

    @classmethod
    def open(cls, name: str) -> "RunDirectory":
        """Returns the run of a name or path, or the newest run for "latest".

        Raises UserError, with the nearest name, if there is no such run.
        """
        runs = {run.name: run for run in all_runs()}
        if name == LATEST and runs:
            return max(runs.values(), key=lambda run: run.created)
        if name in runs:
            return runs[name]
        run = cls(Path(os.path.abspath(name)))
        if os.path.isfile(run.experiment_file):
            return cls(run.path.resolve())
        near = did_you_mean(name, runs)
        message = f"{cut(name, 100)}: no such run in {paths.runs_dir()}{near}"
        raise UserError(message, hint="" if near else "no_run")

    @property
    def created(self) -> float:
        """Unix seconds, from experiment.yaml, which is written once; 0 if it cannot be read."""
        try:
            return self.experiment_file.stat().st_mtime
        except OSError:
            return 0.0

    def experiment(self) -> Experiment:
        return load_experiment(self.experiment_file)

    def submissions(self) -> list[dict[str, Any]]:
        """Returns every submission of the run, oldest first. Raises UserError if launch.json is damaged."""
        return json_file.load(self.launch_file, _SUBMISSIONS) or []


@contextmanager
def new_folder(path: Path, taken: UserError) -> Iterator[Path]:
    """Yields an empty folder that becomes `path` at the end of the block, or vanishes if that fails.

    Raises `taken` if `path` exists by then, and UserError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise taken from None
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def all_runs() -> list[RunDirectory]:
    """Returns every run under home(), newest first; those that cannot be read are last."""
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
        # A broken link used to be a run, or its experiment.
        return run.experiment_file.is_symlink() or not run.path.exists()
    except OSError:
        return True


def find_sweep(name: str) -> Path:
    """Returns the folder of the sweep of a name, or of the newest for "latest".

    Raises UserError, with the nearest name, if there is no such sweep.
    """
    files = {file.parent.name: file for file in paths.sweeps_dir().glob("[!.]*/experiment.yaml")}
    if name == LATEST and files:
        return max(files.values(), key=lambda file: file.stat().st_mtime).parent
    if name not in files:
        near = did_you_mean(name, files)
        raise UserError(f"{cut(name, 100)}: no such sweep in {paths.sweeps_dir()}{near}")
    return files[name].parent


def check_new_name(name: str | None) -> None:
    """Raises UserError if a new run cannot have that name; None stands for a name that is always free."""
    if name is None:
        return
    well_formed = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name)
    if not well_formed or len(name) > LONGEST_NAME or name == LATEST:
        raise UserError(
            f"--name {cut(name, 100)}: a run's name is letters, digits, '_', '.', '-', at most"
            f" {LONGEST_NAME} of them, and not {LATEST!r}"
        )
    if (paths.runs_dir() / name).exists():
        raise _taken(paths.runs_dir() / name)


def _taken(path: Path) -> UserError:
    return UserError(f"run name {path.name} is taken ({path})", hint="run_taken", name=path.name)


def telling_name(stem: str, values: Mapping[str, str]) -> str:
    """Returns a stem and the keys that differ, such as "demo-latent_dim_64-lr_3e-4"."""
    parts = [f"{key.rpartition('.')[2]}_{value}" for key, value in values.items()]
    text = re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join([stem, *parts]))
    return text[:_LONGEST_NAME_WITH_VALUES].rstrip("-._")


def free_name(stem: str, folder: Path | None = None) -> str:
    """Returns a stem and the time, as a name that is free in `folder`, by default that of all runs."""
    folder = folder or paths.runs_dir()
    base = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (base, *(f"{base}-{n}" for n in range(2, 1000)))
    return next(name for name in names if not (folder / name).exists())
