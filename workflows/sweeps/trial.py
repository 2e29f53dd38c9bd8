"""A trial of a sweep: an ordinary run of this machine that Ray Tune starts, watches and ends."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ray import tune

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files import paths
from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import job_state
from slurm.cluster_file import ClusterConfig, Place, Placement
from workflows.jobs.run_state import last_submission, run_state, total_steps
from workflows.jobs.submission import submit
from workflows.sweeps.directory import SweepDirectory, values_of
from workflows.sweeps.sweep_file import with_values

_POLL_S = 0.3
_STATE_POLL_S = 1.5
_SAVE_PATIENCE_S = 60.0
_POINTER = "run.json"
# How long a trial whose run was stopped from outside waits for the end of the whole sweep.
_STOPPED_S = 60.0


class TrialRun(tune.Trainable):  # type: ignore[misc]  # Ray is not checked, see pyproject
    """Returns one result per evaluation: the metrics of the journal, `status`, `reason` and `run`.

    A run that fails is a result, too (status "failed"). Only a lost process is an error, after which
    Ray Tune starts the trial again, and the run continues from its checkpoint.
    """

    def setup(self, config: dict[str, Any], sweep: str, ranks: int, slots: int) -> None:
        # The run is a job of this machine, within the allocation of the sweep.
        for name in [key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_"))]:
            del os.environ[name]
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // (slots * ranks)))
        self.sweep = SweepDirectory(Path(sweep))
        self.ranks = ranks
        self.values = values_of(config)
        self.run = RunDirectory(paths.runs_dir() / self.trial_name)
        self.reported_step = -1
        self.newest: dict[str, Any] | None = None
        self.results: Iterator[dict[str, Any]] | None = None

    def step(self) -> dict[str, Any]:
        if self.results is None:
            self.results = self._follow()
        return next(self.results)

    def _follow(self) -> Iterator[dict[str, Any]]:
        """Starts the run and yields its results after `reported_step` until it ends."""
        try:
            self._start()
        except UserError as error:
            yield self._failure(str(error))
            return
        total, offset, asked_at, state = total_steps(self.run), 0, 0.0, run_state(self.run)
        while True:
            if time.monotonic() - asked_at > _STATE_POLL_S:
                asked_at, state = time.monotonic(), run_state(self.run)
            lines, offset = journal.read(self.run.journal_file, offset)
            for line in lines:
                if line["kind"] == "epoch" and line["step"] > self.reported_step:
                    self.reported_step, self.newest = line["step"], line
                    if line["step"] != total:
                        yield self._result(line, "running")
                    else:
                        _wait_until(lambda: not run_state(self.run).job.alive)
                        yield self._result(line, "finished")
            if lines:
                asked_at = 0.0
            elif not state.job.alive:
                if state.status == "finished":
                    yield self._last_result()
                elif (last := last_submission(self.run)) and last.cancelled is not None:
                    yield self._failure(f"cancelled: {state.reason}")
                elif state.status in ("stopped", "cancelled"):
                    # The allocation may be ending, whose signals reach all processes at about the same time.
                    time.sleep(_STOPPED_S)
                    raise RuntimeError(f"{self.run.name} was stopped: {state.reason}")
                else:
                    yield self._failure(state.reason)
            time.sleep(_POLL_S)

    def _start(self) -> None:
        """Creates the run, or continues it from its checkpoint."""
        experiment = self._experiment()
        if not self.run.experiment_file.is_file():
            RunDirectory.create(self.run.name, experiment)
        state = run_state(self.run)
        if state.status == "finished":
            return
        if state.job.alive:  # saving, after its driver was killed
            self.cleanup()
        place = Place("local", ClusterConfig(executor="local", max_restarts=1), "a sweep's trial")
        submit(self.run, place, Placement(1, self.ranks), self.ranks, part_of_sweep=True)

    def _experiment(self) -> Experiment:
        try:
            return with_values(self.sweep.experiment(), self.values)
        except UserError as error:
            raise UserError(f"wrong combination: {error}") from None

    def _last_result(self) -> dict[str, Any]:
        lines = journal.read(self.run.journal_file)[0]
        # A run that was forked from finished weights has no evaluation of its own.
        newest = next((x for x in reversed(lines) if x["kind"] == "epoch"), self.newest)
        assert newest is not None
        return self._result(newest, "finished")

    def _result(self, line: dict[str, Any], status: str) -> dict[str, Any]:
        state = {"status": status, "run": self.run.name, "done": status != "running"}
        return {"epoch": line["epoch"], "step": line["step"], **line["metrics"], **state}

    def _failure(self, reason: str) -> dict[str, Any]:
        reason = " ".join(reason.split())
        return {"status": "failed", "reason": reason, "run": self.run.name, "done": True}

    def cleanup(self) -> None:
        """Ends the run if it is alive; it saves a checkpoint first."""
        submission = last_submission(self.run) if self.run.launch_file.exists() else None
        if submission is not None and job_state.look(submission).alive:
            job_state.end(submission, _SAVE_PATIENCE_S, print)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Writes a pointer to the run's own checkpoint, once that is on the disk."""

        def is_saved_or_over() -> bool:
            lines = journal.read_outline(self.run.journal_file)
            saved = (x["step"] for x in lines if x["kind"] == "checkpoint")
            return max(saved, default=-2) >= self.reported_step or not run_state(self.run).job.alive

        _wait_until(is_saved_or_over)
        pointer = {"trial": self.trial_id, "run": self.run.name}
        pointer |= {"step": self.reported_step, "newest": self.newest}
        Path(checkpoint_dir, _POINTER).write_text(json.dumps(pointer))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Continues the same run or, under population based training, another trial's weights."""
        pointer = json.loads(Path(checkpoint_dir, _POINTER).read_text())
        origin = RunDirectory(paths.runs_dir() / pointer["run"])
        self.reported_step, self.newest = pointer["step"], pointer["newest"]
        try:
            experiment = self._experiment()
        except UserError as error:
            self.results = iter([self._failure(str(error))])
            return
        if pointer["trial"] == self.trial_id and origin.experiment() == experiment:
            self.run = origin
        else:
            self.run = fork(origin, self.reported_step, self.trial_name, experiment)


def fork(origin: RunDirectory, step: int, stem: str, experiment: Experiment) -> RunDirectory:
    """Returns a run that begins from another's checkpoint at `step`, or its newest if that is gone.

    A repeated call, as after the driver's death, returns the run that the first one made.
    """
    for number in itertools.count(1):
        run = RunDirectory(paths.runs_dir() / f"{stem}-from_{step}-{number}")
        if not run.experiment_file.is_file():
            run = RunDirectory.create(run.name, experiment)
        if run.experiment() == experiment:
            break
    if not any(run.checkpoints.glob("step-*")):
        saved = sorted(origin.checkpoints.glob("step-*"))
        chosen = next((path for path in saved if int(path.name[5:]) == step), saved[-1])
        nascent = run.checkpoints / f".{chosen.name}.new"
        shutil.rmtree(nascent, ignore_errors=True)
        shutil.copytree(chosen, nascent)
        nascent.rename(run.checkpoints / chosen.name)
    return run


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SAVE_PATIENCE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(_POLL_S)
