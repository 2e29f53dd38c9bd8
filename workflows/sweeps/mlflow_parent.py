"""A sweep in MLflow: a parent run with the trials' runs below it. Slow to import because of MLflow."""

import csv
import io
import json
import logging
import os
import time
from dataclasses import asdict

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.tracking import MlflowClient

from cvae.config import yaml_model
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import RunDirectory
from cvae.tracking import mlflow_state
from cvae.tracking.mlflow_push import Pusher
from cvae.tracking.mlflow_store import NOTE, create_store, description, experiment_id
from workflows.sweeps.directory import SweepDirectory, Trial, best_trial

_TAG = "cvae.sweep_id"
_log = logging.getLogger(__name__)


class SweepMirror:
    """Writes a sweep to MLflow. Its methods raise MLflow's errors, and can then be called again."""

    def __init__(self, sweep: SweepDirectory):
        self.sweep = sweep
        self.settings = sweep.sweep()
        self.state = mlflow_state.load(sweep.path)
        self.uri = mlflow_state.tracking_uri(self.state)
        self._client: MlflowClient | None = None
        self._parent = ""
        self._pushers: dict[str, Pusher] = {}
        self._refused: set[str] = set()
        self._logged_state = ""

    def push(self) -> None:
        """Writes what has changed since the last call."""
        client = self._open()
        trials = self.sweep.trials()
        for trial in trials:
            for run in trial.runs:
                self._push_run(RunDirectory(paths.runs_dir() / run), trial)
        self._log_parent(client, trials)

    def end(self) -> None:
        """Ends the parent run and, if they have no end of their own, the trials' runs."""
        client, trials = self._open(), self.sweep.trials()
        size = self.sweep.trials_size()  # read before the end: more trials may follow
        for pusher in self._pushers.values():
            pusher.end_unless_ended()
        complete = bool(trials) and all(trial.ended for trial in trials)
        client.set_terminated(self._parent, "FINISHED" if complete else "KILLED")
        self.state.offset = size
        mlflow_state.save(self.sweep.path, self.state)

    def _open(self) -> MlflowClient:
        """Returns a client, after it has found or created the parent run."""
        if self._client is not None:
            return self._client
        create_store(self.uri)
        client = MlflowClient(tracking_uri=self.uri)
        experiment = experiment_id(client, self.sweep.experiment().name, self.uri)
        runs = client.search_runs([experiment], f"tags.`{_TAG}` = '{self.state.run_dir_id}'")
        self._parent = (runs[0] if runs else self._create_parent(client, experiment)).info.run_id
        client.update_run(self._parent, status="RUNNING")
        self.state.run_id, self.state.offset = self._parent, 0
        mlflow_state.save(self.sweep.path, self.state)
        self._client = client
        return client

    def _create_parent(self, client: MlflowClient, experiment: str) -> Run:
        tags = {
            _TAG: self.state.run_dir_id,
            "sweep": self.sweep.name,
            "mlflow.user": os.environ.get("USER") or f"uid {os.getuid()}",
            "mlflow.source.type": "JOB",
            "mlflow.source.name": "workflows/sweep.py",
        }
        run = client.create_run(experiment, run_name=self.sweep.name, tags=tags)
        keys = yaml_model.flatten(self.settings.model_dump(mode="json", exclude_unset=True))
        params = [Param(key, json.dumps(value)[:500]) for key, value in keys.items()]
        client.log_batch(run.info.run_id, params=params)
        client.log_artifact(run.info.run_id, str(self.sweep.sweep_file))
        return run

    def _push_run(self, run: RunDirectory, trial: Trial) -> None:
        if not run.journal_file.exists():
            return
        if run.name not in self._pushers:
            tags = {
                "mlflow.parentRunId": self._parent,
                "sweep": self.sweep.name,
                "trial": str(trial.index),
                **{f"varied.{key}": str(value) for key, value in trial.values.items()},
            }
            self._pushers[run.name] = Pusher(run.path, tags)
        try:
            self._pushers[run.name].push()
        except UserError as error:
            if run.name not in self._refused:
                self._refused.add(run.name)
                _log.error("%s: %s", run.name, error)

    def _log_parent(self, client: MlflowClient, trials: list[Trial]) -> None:
        """Logs the counts, the best value and the table of trials, if any has changed."""
        best = best_trial(trials, self.settings.mode)
        ended = [trial for trial in trials if trial.ended]
        state = json.dumps([best and (best.run, best.best), len(ended), len(trials)])
        if state == self._logged_state:
            return
        values: dict[str, float] = {
            "trials/ended": len(ended),
            "trials/failed": sum(trial.status == "failed" for trial in ended),
        }
        tags = [RunTag(NOTE, _note(self.sweep, trials, best))]
        if best is not None and best.best is not None:
            values[f"best/{self.settings.metric}"] = best.best
            tags.append(RunTag("best_trial", best.run))
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, len(ended)) for name, value in values.items()]
        client.log_batch(self._parent, metrics=metrics, tags=tags)
        client.log_text(self._parent, _table(trials), "trials.csv")
        self._logged_state = state


def _note(sweep: SweepDirectory, trials: list[Trial], best: Trial | None) -> str:
    lines = [f"Sweep `{sweep.name}`: {sum(t.ended for t in trials)} of {len(trials)} trials ended."]
    if best is not None:
        changes = ", ".join(f"{key} = {value}" for key, value in best.values.items())
        lines.append(f"Best so far: `{best.run}` with {changes}.")
    launches = sweep.launches()
    commands = {"Launched with": f"python {launches[0]['command']}"} if launches else {}
    commands |= {
        "Its report": f"python analysis/report.py --sweep {sweep.name} --out reports/{sweep.name}",
        "Go on with it": f"python workflows/sweep.py --resume {sweep.name}",
    }
    return "\n\n".join([*lines, description(commands)])


def _table(trials: list[Trial]) -> str:
    """Returns the trials as CSV, with a column for each key of their values."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    columns = ["trial", "run", "status", "epoch", "best", *keys, "reason"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({"trial": trial.index, **asdict(trial), **trial.values} for trial in trials)
    return text.getvalue()
