"""What the driver writes down about the trials while Ray Tune runs them: trials.json, a line at a time."""

import json
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

from ray import tune

from cvae.run.directory import all_runs
from workflows.sweeps.directory import SweepDirectory, Trial, run_name, values_of

_REPORTED = ("status", "reason", "epoch", "step", "run")


class Book(tune.Callback):  # type: ignore[misc]  # Ray is not checked, see pyproject
    """Names the trials' runs and keeps trials.json. Pickled with Ray Tune's state: all it knows is the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: set[str] | None = None
        self._closed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_seen": None, "_closed": set()}

    def name(self, trial: Any) -> str:
        """The run of a new trial; called once, when Ray Tune makes the trial."""
        sweep = SweepDirectory(self.folder)
        trials = sweep.trials()
        if self._seen is None:
            self._seen = known_to_tune(sweep)
        values = values_of(trial.config)
        # Killed between a trial's beginning and Ray Tune's next note of its state, Tune makes it anew.
        lost = (one for one in trials if one.id not in self._seen and one.values == values)
        entry = next(lost, None)
        if entry is None:
            taken = {run.name for run in all_runs()} | {one.run for one in trials}
            index = max((one.index for one in trials), default=-1) + 1
            name = run_name(sweep.name, index, values)
            while name in taken:
                name += "-2"
            entry = Trial(index, trial.trial_id, name, values, runs=[name])
            trials.append(entry)
        entry.id = trial.trial_id
        self._seen.add(trial.trial_id)
        sweep.write_trials(trials)
        return entry.run

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(trial, status="running")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        told = {key: result[key] for key in _REPORTED if key in result}
        metrics = {
            key: value
            for key, value in result.items()
            if key.startswith("val/") and isinstance(value, float)
        }
        self._note(trial, metrics=metrics, **told)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = (trial.last_result or {}).get("status")
        self._note(trial, status=last if last in ("finished", "failed") else "stopped early")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """What the budget's end has stopped, Ray Tune tells nobody of."""
        for trial in trials:
            if trial.status == "TERMINATED" and trial.trial_id not in self._closed:
                self._closed.add(trial.trial_id)
                told = {one.id: one for one in SweepDirectory(self.folder).trials()}
                if trial.trial_id in told and not told[trial.trial_id].ended:
                    self._note(trial, status="stopped early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = str(trial.get_error() or "the trial's process was lost").strip().splitlines()[-1]
        self._note(trial, status="failed", reason=reason[:300])

    def _note(self, trial: Any, **changes: Any) -> None:
        sweep = SweepDirectory(self.folder)
        told, settings = sweep.trials(), sweep.sweep()
        entry = next(one for one in told if one.id == trial.trial_id)
        before = deepcopy(entry)
        # Under population based training the keys change on the way.
        entry.values = values_of(trial.config)
        for key, value in changes.items():
            if key != "metrics" or value:
                setattr(entry, key, value)
        if entry.run not in entry.runs:
            entry.runs.append(entry.run)
        value = changes.get("metrics", {}).get(settings.metric)
        if value is not None and math.isfinite(value):
            better = min if settings.mode == "min" else max
            entry.best = value if entry.best is None else better(entry.best, value)
        if entry != before:
            sweep.write_trials(told)
        if "epoch" in changes:
            _mark_progress(self.folder, sum(one.step for one in told))


def _mark_progress(folder: Path, steps: int) -> None:
    """For the job's care: a sweep that gets further may be tried again, however often."""
    old = sorted(folder.glob("progress-*"))
    mark = folder / f"progress-{steps:012}"
    mark.touch()
    for file in old:
        if file != mark:
            file.unlink()


def known_to_tune(sweep: SweepDirectory) -> set[str]:
    """The ids of the trials in the newest state that Ray Tune has written; none where that is damaged."""
    states = sorted(sweep.ray.glob("experiment_state-*.json"), key=lambda f: f.stat().st_mtime)
    try:
        text = json.dumps(json.loads(states[-1].read_text()))
    except (IndexError, ValueError):
        return set()
    return set(re.findall(r'\\?"trial_id\\?": \\?"([^"\\]+)', text))
