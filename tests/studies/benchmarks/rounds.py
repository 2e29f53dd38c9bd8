"""Runs contestants one after the other, round by round, so that the machine's drift affects all alike."""

import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files.paths import PROJECT_ROOT
from cvae.run import journal
from cvae.run.code_snapshot import CodeSnapshot
from cvae.run.directory import RunDirectory
from slurm.cluster_file import Place, Placement
from slurm.executors import Job
from tests.studies.benchmarks import starts
from tests.studies.benchmarks.contestants import BARE
from workflows.jobs.submission import TRAIN, job_environment, training_environment
from workflows.jobs.waiting import run_and_wait

MEASURE = "tests.studies.benchmarks.contestants:measure"
PREPARE = "tests.studies.benchmarks.preparation:measure"
# Polling a job costs some milliseconds of the measured cores.
_POLL_S = 1.0
_POINTS = 8
_FIRST_POINTS = 2  # start-up and warm-up
_UNTIL_MIRRORED_S = 10.0


@dataclass
class Bench:
    """Where and how long to measure; `folder` keeps every job's files and logs."""

    place: Place
    folder: Path
    seconds: float
    coco: Path | None = None
    _jobs: int = field(default=0, init=False)

    def contestant(self, name: str, run: RunDirectory) -> dict[str, Any]:
        """Returns the results of contestants.measure."""
        result = self._new(name.replace(" ", "-")) / "result.json"
        arguments = (name, str(run.experiment_file), self.seconds, self.coco, result)
        # Peers run as other people run them.
        env = training_environment() if name == BARE else {}
        self._run(MEASURE, arguments, result.parent, Placement(1, 1), env)
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured

    def preparation(self, name: str) -> dict[str, float]:
        """Returns the results of preparation.measure."""
        result = self._new(name) / "result.json"
        arguments = (name, self.coco, self.seconds, result)
        self._run(PREPARE, arguments, result.parent, Placement(1, 1), {})
        measured: dict[str, float] = json.loads(result.read_text())
        return measured

    def loop(
        self,
        experiment: Experiment,
        placement: Placement,
        images_per_second: float,
        saves: bool = False,
        mirrored: bool = False,
        env: dict[str, str] | None = None,
    ) -> dict[str, float]:
        """Runs the real training loop for about `seconds`, as predicted from images_per_second.

        mirrored: with as many points in the journal as the experiment asks for, copied to MLflow; points before
        MLflow's process has started do not count. Returns images_per_second and data_wait_share; with `saves`
        also checkpoint_stall_s.
        """
        batch_size = experiment.training.global_batch_size
        steps = max(_POINTS, round(self.seconds * images_per_second / batch_size))
        every = -(-steps // (_POINTS - _FIRST_POINTS))
        endless: dict[str, Any] = {"max_steps": None, "epochs": 1e6, "eval_every": 10**9}
        if not mirrored:
            endless["log_every"] = every
        training = experiment.training.model_copy(update=endless)
        checkpoint = experiment.checkpoint.model_copy(
            update={"every_steps": every if saves else None}
        )
        made = experiment.model_copy(update={"training": training, "checkpoint": checkpoint})
        run = RunDirectory.create("run", made, self._new("loop"))

        def lines(kind: str) -> list[dict[str, Any]]:
            return [line for line in journal.read(run.journal_file)[0] if line["kind"] == kind]

        def counted() -> list[dict[str, Any]]:
            points = lines("step")[_FIRST_POINTS:]
            if not mirrored:
                return points
            return [one for one in points if one["time"] > points[0]["time"] + _UNTIL_MIRRORED_S]

        def is_enough() -> bool:
            points = counted()
            if saves and len(lines("checkpoint")) <= _POINTS // 2:
                return False
            if mirrored:
                return len(points) > 1 and points[-1]["time"] - points[0]["time"] > self.seconds
            return len(points) > _POINTS - _FIRST_POINTS

        # These are no runs of the user's, so they stay out of their MLflow.
        tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{run.path / 'mlflow.db'}"}
        made_env = {**training_environment(), **tracking, **(env or {})}
        self._run(TRAIN, (run.path, mirrored), run.logs, placement, made_env, is_enough)
        measured = rates([point["metrics"] for point in counted()])
        if saves:
            # The first one also makes the buffers that it copies to.
            stalls = [line["stall_s"] for line in lines("checkpoint")[1:]]
            measured["checkpoint_stall_s"] = statistics.median(stalls)
        return measured

    def launch(self, run: RunDirectory, placement: Placement) -> float:
        """Returns the seconds from launch.py to the first step."""
        folder = self._new("launch")
        return starts.launch(folder / "home", run.experiment_file, self.place, placement)

    def write(self, experiment: Experiment) -> RunDirectory:
        """Writes the experiment to a file that the jobs read."""
        return RunDirectory.create("experiment", experiment, self._new("experiment"))

    def _run(
        self,
        target: str,
        arguments: tuple[Any, ...],
        logs: Path,
        placement: Placement,
        env: dict[str, str],
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Runs a job until it ends or is_enough(). Raises UserError with the first failure."""
        environment = {**job_environment(CodeSnapshot().write()), **env}
        # A snapshot holds no tests, and the contestants are among them.
        environment["PYTHONPATH"] += f"{os.pathsep}{PROJECT_ROOT}"
        job = Job("benchmark", logs, target, arguments, environment)
        ended = run_and_wait(
            job, self.place, placement, placement.world_size, is_enough=is_enough, poll_s=_POLL_S
        )
        if ended.failure is not None:
            raise UserError(f"{target.partition(':')[0]} failed: {ended.cause}; log: {ended.log}")

    def _new(self, name: str) -> Path:
        self._jobs += 1
        folder = self.folder / f"{self._jobs:03}-{name}"
        folder.mkdir(parents=True)
        return folder


def rates(points: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean rate and the share of waiting over intervals with the same number of steps each."""
    seconds = [1 / point["train/images_per_second"] for point in points]
    waited = sum(t * p["train/data_wait_share"] for t, p in zip(seconds, points, strict=True))
    return {
        "images_per_second": len(points) / sum(seconds),
        "data_wait_share": waited / sum(seconds),
    }
