"""A sweep in MLflow: a parent run, and the trials' journals under it. Slow to import: see mirror.py."""

import csv
import io
import json
import logging
import os
import time
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from cvae.config import yaml_model
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import RunDirectory
from cvae.tracking import mlflow_state
from cvae.tracking.mlflow_push import Pusher
from cvae.tracking.mlflow_store import create_store, experiment_id
from cvae.tracking.mlflow_tags import NOTE, description
from workflows.sweeps.directory import SweepDirectory, Trial, best_trial

_TAG = "cvae.sweep_id"
_log = logging.getLogger(__name__)


class SweepMirror:
    """Methods raise what MLflow raises while it is away, and can be called again at any time."""

    def __init__(self, sweep: SweepDirectory):
        self.sweep = sweep
        self.settings = sweep.sweep()
        self.state = mlflow_state.load(sweep.path)
        self.uri = mlflow_state.tracking_uri(self.state)
        self._pushers: dict[str, Pusher] = {}
        self._client: MlflowClient | None = None
        self._refused: set[str] = set()
        self._told = ""

    def push(self) -> None:
        client = self._open()
        trials = self.sweep.trials()
        for trial in trials:
            for run in trial.runs:
                self._push_run(RunDirectory(paths.runs_dir() / run), trial)
        self._tell_parent(client, trials)

    def end(self) -> None:
        """Says how the sweep ended, as far as it is at an end."""
        client, trials = self._open(), self.sweep.trials()
        # Of what the parent is ended with, in case that more trials follow.
        size = self.sweep.trials_file.stat().st_size if self.sweep.trials_file.exists() else 0
        for pusher in self._pushers.values():
            pusher.end_unless_ended()
        over = bool(trials) and all(trial.ended for trial in trials)
        client.set_terminated(self._parent, "FINISHED" if over else "KILLED")
        self.state.offset = size
        mlflow_state.save(self.sweep.path, self.state)

    @property
    def _parent(self) -> str:
        assert self.state.run_id is not None
        return self.state.run_id

    def _open(self) -> MlflowClient:
        if self._client is not None:
            return self._client
        create_store(self.uri)
        client = MlflowClient(tracking_uri=self.uri)
        experiment = experiment_id(client, self.sweep.experiment().name, self.uri)
        mark = f"tags.`{_TAG}` = '{self.state.run_dir_id}'"
        found = client.search_runs([experiment], mark)
        if found:
            parent = found[0].info.run_id
        else:
            tags = {
                _TAG: self.state.run_dir_id,
                "sweep": self.sweep.name,
                "mlflow.user": os.environ.get("USER") or f"uid {os.getuid()}",
                "mlflow.source.type": "JOB",
                "mlflow.source.name": "workflows/sweep.py",
            }
            made = client.create_run(experiment, run_name=self.sweep.name, tags=tags)
            parent = made.info.run_id
            params = yaml_model.flatten(self.settings.model_dump(mode="json", exclude_unset=True))
            entities = [Param(key, json.dumps(value)[:500]) for key, value in params.items()]
            client.log_batch(parent, params=entities)
            client.log_artifact(parent, str(self.sweep.sweep_file))
        client.update_run(parent, status="RUNNING")
        self.state.run_id, self.state.offset = parent, 0
        mlflow_state.save(self.sweep.path, self.state)
        self._client = client
        return client

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

    def _tell_parent(self, client: MlflowClient, trials: list[Trial]) -> None:
        """Counts and the best so far, where anything has changed."""
        best = best_trial(trials, self.settings.mode)
        ended = [trial for trial in trials if trial.ended]
        told = json.dumps([best and (best.run, best.best), len(ended), len(trials)])
        if told == self._told:
            return
        now, failed = int(time.time() * 1000), sum(x.status == "failed" for x in ended)
        points = [
            Metric("trials/ended", len(ended), now, len(ended)),
            Metric("trials/failed", failed, now, len(ended)),
        ]
        tags = [RunTag(NOTE, _note(self.sweep, trials, best))]
        if best is not None and best.best is not None:
            points.append(Metric(f"best/{self.settings.metric}", best.best, now, len(ended)))
            tags.append(RunTag("best_trial", best.run))
        client.log_batch(self._parent, metrics=points, tags=tags)
        client.log_text(self._parent, _table(trials), "trials.csv")
        self._told = told


def _note(sweep: SweepDirectory, trials: list[Trial], best: Trial | None) -> str:
    lines = [f"Sweep `{sweep.name}`: {sum(t.ended for t in trials)} of {len(trials)} trials ended."]
    if best is not None:
        changed = ", ".join(f"{key} = {value}" for key, value in best.values.items())
        lines.append(f"Best so far: `{best.run}` with {changed}.")
    launches = sweep.launches()
    commands = {"Launched with": f"python {launches[0]['command']}"} if launches else {}
    commands |= {
        "Its report": f"python analysis/report.py --sweep {sweep.name} --out reports/{sweep.name}",
        "Go on with it": f"python workflows/sweep.py --resume {sweep.name}",
    }
    return "\n\n".join([*lines, description(commands)])


def _table(trials: list[Trial]) -> str:
    text = io.StringIO()
    keys = list(dict.fromkeys(key for trial in trials for key in trial.values))
    writer = csv.writer(text)
    writer.writerow(["trial", "run", "status", "epoch", "best", *keys, "reason"])
    for trial in trials:
        values: list[Any] = [trial.values.get(key) for key in keys]
        told = [trial.index, trial.run, trial.status, trial.epoch, trial.best]
        writer.writerow([*told, *values, trial.reason])
    return text.getvalue()
