"""A trial of a sweep: an ordinary run of this machine, started, watched and ended on Ray Tune's behalf."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
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
_ASK_S = 1.5
_SAVE_PATIENCE_S = 60.0
_POINTER = "run.json"
# How long a run that somebody else has stopped waits for the sweep's own end.
_STOPPED_S = 60.0


class TrialRun(tune.Trainable):  # type: ignore[misc]  # Ray is not checked, see pyproject
    """One result an evaluation: the journal's epoch line and `status`, `reason`, `run`.

    A run that fails is a result, too (status "failed"): only a lost process is an error, after which Ray Tune
    starts the trial again, and the run goes on from its checkpoint.
    """

    def setup(self, config: dict[str, Any], sweep: str, ranks: int, slots: int) -> None:
        # Of the allocation that the sweep runs in: this run is a job of this machine.
        for name in [key for key in os.environ if key.startswith(("SLURM_", "SUBMITIT_"))]:
            del os.environ[name]
        cores = len(os.sched_getaffinity(0))
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // (slots * ranks)))
        self.sweep = SweepDirectory(Path(sweep))
        self.ranks = ranks
        self.values = values_of(config)
        self.run = RunDirectory(paths.runs_dir() / self.trial_name)
        self.reported = -1
        self.newest: dict[str, Any] | None = None
        self.results: Iterator[dict[str, Any]] | None = None

    def step(self) -> dict[str, Any]:
        if self.results is None:
            self.results = self._live()
        return next(self.results)

    def _live(self) -> Iterator[dict[str, Any]]:
        """The run's results from its first evaluation, or after a restart from the first not reported."""
        try:
            self._start()
        except UserError as error:
            yield self._failed(str(error))
            return
        total, offset, asked, state = total_steps(self.run), 0, 0.0, run_state(self.run)
        while True:
            if time.monotonic() - asked > _ASK_S:
                asked, state = time.monotonic(), run_state(self.run)
            lines, offset = journal.read(self.run.journal_file, offset)
            for line in lines:
                if line["kind"] == "epoch" and line["step"] > self.reported:
                    self.reported, self.newest = line["step"], line
                    if line["step"] != total:
                        yield self._result(line, "running")
                    else:
                        self._wait_for_end()
                        yield self._result(line, "finished")
            if lines:
                asked = 0.0
            elif not state.job.alive and state.status == "finished":
                lines = journal.read(self.run.journal_file)[0]
                evaluated = [line for line in lines if line["kind"] == "epoch"]
                # One that took over finished weights has no evaluation of its own.
                newest = evaluated[-1] if evaluated else self.newest
                assert newest is not None
                yield self._result(newest, "finished")
            elif not state.job.alive and _submission(self.run).cancelled is not None:
                yield self._failed(f"cancelled: {state.reason}")
            elif not state.job.alive and state.status in ("stopped", "cancelled"):
                # The allocation is ending: its signals reach every process. If not, the run goes on.
                time.sleep(_STOPPED_S)
                raise RuntimeError(f"{self.run.name} was stopped: {state.reason}")
            elif not state.job.alive:
                yield self._failed(state.reason)
            time.sleep(_POLL_S)

    def _start(self) -> None:
        """Makes the run, or continues it where it is."""
        try:
            experiment = with_values(self.sweep.experiment(), self.values)
        except UserError as error:
            raise UserError(f"wrong combination: {error}") from None
        if not self.run.experiment_file.is_file():
            RunDirectory.create(self.run.name, experiment)
        state = run_state(self.run)
        if state.status == "finished":
            return
        if state.job.alive:
            # Of a driver that was killed a moment ago: it is saving.
            job_state.end(_submission(self.run), _SAVE_PATIENCE_S, print)
        place = Place("local", ClusterConfig(executor="local", max_restarts=1), "a sweep's trial")
        submit(self.run, place, Placement(1, self.ranks), self.ranks, part_of_sweep=True)

    def _wait_for_end(self) -> None:
        deadline = time.monotonic() + _SAVE_PATIENCE_S
        while run_state(self.run).job.alive and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _result(self, line: dict[str, Any], status: str) -> dict[str, Any]:
        told = {"status": status, "run": self.run.name, "done": status != "running"}
        return {"epoch": line["epoch"], "step": line["step"], **line["metrics"], **told}

    def _failed(self, reason: str) -> dict[str, Any]:
        reason = " ".join(reason.split())
        return {"status": "failed", "reason": reason, "run": self.run.name, "done": True}

    def cleanup(self) -> None:
        """Ends the run where it is; it saves first, and could be continued."""
        submission = last_submission(self.run) if self.run.launch_file.exists() else None
        if submission is not None and job_state.look(submission).alive:
            job_state.end(submission, _SAVE_PATIENCE_S, print)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """A pointer: the weights lie in the run's own folder, and are on the disk when this returns."""
        deadline = time.monotonic() + _SAVE_PATIENCE_S
        while not self._saved(self.reported) and time.monotonic() < deadline:
            if not run_state(self.run).job.alive:
                break
            time.sleep(_POLL_S)
        pointer = {
            "trial": self.trial_id,
            "run": self.run.name,
            "step": self.reported,
            "newest": self.newest,
        }
        Path(checkpoint_dir, _POINTER).write_text(json.dumps(pointer))

    def _saved(self, step: int) -> bool:
        lines = journal.read_outline(self.run.journal_file)
        return any(line["kind"] == "checkpoint" and line["step"] >= step for line in lines)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Goes on from where that was, or (population based training) from another trial's weights."""
        pointer = json.loads(Path(checkpoint_dir, _POINTER).read_text())
        origin = RunDirectory(paths.runs_dir() / pointer["run"])
        self.reported, self.newest = pointer["step"], pointer["newest"]
        try:
            experiment = with_values(self.sweep.experiment(), self.values)
        except UserError as error:
            self.results = iter([self._failed(f"wrong combination: {error}")])
            return
        if pointer["trial"] == self.trial_id and origin.experiment() == experiment:
            self.run = origin
        else:
            self.run = fork(origin, self.reported, self.trial_name, experiment)


def fork(origin: RunDirectory, step: int, stem: str, experiment: Experiment) -> RunDirectory:
    """A run that begins from another's checkpoint at `step`, or the newest where that is gone.

    Asked again, as after a driver's death, it is the one that was made before.
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


def _submission(run: RunDirectory) -> job_state.Submission:
    submission = last_submission(run)
    assert submission is not None
    return submission
