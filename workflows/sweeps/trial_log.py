"""Keeps trials.json while Ray Tune runs the trials."""

import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from ray import tune

from cvae.run.directory import all_runs
from workflows.sweeps.directory import SweepDirectory, Trial, run_name, values_of


class TrialLog(tune.Callback):  # type: ignore[misc]  # Ray is not checked, see pyproject
    """Names the trials' runs and writes trials.json. It is pickled with Ray Tune's state."""

    def __init__(self, folder: Path) -> None:
        self.sweep = SweepDirectory(folder)
        self._known_ids: set[str] | None = None
        self._closed_ids: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"sweep": self.sweep, "_known_ids": None, "_closed_ids": set()}

    def name(self, trial: Any) -> str:
        """Returns the run of a new trial; Ray Tune calls it once, when it creates the trial."""
        trials = self.sweep.trials()
        if self._known_ids is None:
            self._known_ids = ids_known_to_tune(self.sweep)
        values = values_of(trial.config)
        # If the driver is killed after a trial begins and before Tune saves its state, Tune creates the
        # trial again, with another id.
        lost = (one for one in trials if one.id not in self._known_ids and one.values == values)
        entry = next(lost, None)
        if entry is None:
            taken = {run.name for run in all_runs()} | {one.run for one in trials}
            index = max((one.index for one in trials), default=-1) + 1
            name = run_name(self.sweep.name, index, values)
            while name in taken:
                name += "-2"
            entry = Trial(index, trial.trial_id, name, values, runs=[name])
            trials.append(entry)
        entry.id = trial.trial_id
        self._known_ids.add(trial.trial_id)
        self.sweep.write_trials(trials)
        return entry.run

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._update(trial, status="running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        keys = ("status", "reason", "epoch", "step", "run")
        changes = {key: result[key] for key in keys if key in result}
        values = {key: value for key, value in result.items() if key.startswith("val/")}
        if metrics := {key: value for key, value in values.items() if isinstance(value, float)}:
            changes["metrics"] = metrics
        self._update(trial, **changes)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = (trial.last_result or {}).get("status")
        self._update(trial, status=last if last in ("finished", "failed") else "stopped early")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Marks the trials that the end of the budget has stopped, for which Tune makes no other call."""
        for trial in trials:
            if trial.status == "TERMINATED" and trial.trial_id not in self._closed_ids:
                self._closed_ids.add(trial.trial_id)
                if any(x.id == trial.trial_id and not x.ended for x in self.sweep.trials()):
                    self._update(trial, status="stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = str(trial.get_error() or "the trial's process was lost").strip().splitlines()[-1]
        self._update(trial, status="failed", reason=reason[:300])

    def _update(self, trial: Any, **changes: Any) -> None:
        trials, settings = self.sweep.trials(), self.sweep.sweep()
        entry = next(one for one in trials if one.id == trial.trial_id)
        before = deepcopy(entry)
        # Population based training changes values during a trial.
        entry.values = values_of(trial.config)
        for key, value in changes.items():
            setattr(entry, key, value)
        if entry.run not in entry.runs:
            entry.runs.append(entry.run)
        value = changes.get("metrics", {}).get(settings.metric)
        if value is not None and math.isfinite(value):
            better = min if settings.mode == "min" else max
            entry.best = value if entry.best is None else better(entry.best, value)
        if entry != before:
            self.sweep.write_trials(trials)
        if "epoch" in changes:
            self._mark_progress(sum(one.step for one in trials))

    def _mark_progress(self, steps: int) -> None:
        """Shows the job's supervisor that the sweep progresses, so that it may be restarted again."""
        mark = self.sweep.path / f"progress-{steps:012}"
        old = [file for file in self.sweep.path.glob("progress-*") if file != mark]
        mark.touch()
        for file in old:
            file.unlink()


def ids_known_to_tune(sweep: SweepDirectory) -> set[str]:
    """Returns the ids of the trials in Ray Tune's newest saved state; none if that is damaged."""
    states = sorted(sweep.ray.glob("experiment_state-*.json"), key=lambda f: f.stat().st_mtime)
    try:
        text = json.dumps(json.loads(states[-1].read_text()))
    except (IndexError, ValueError):
        return set()
    return set(re.findall(r'\\?"trial_id\\?": \\?"([^"\\]+)', text))
