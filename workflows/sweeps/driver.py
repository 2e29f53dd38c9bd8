"""Runs the trials with Ray Tune: `python -m workflows.sweeps.driver FOLDER SLOTS GPUS_PER_TRIAL`, where Ray is up.

A process of its own: it may be killed at any moment, and is then started again and goes on.
"""

import itertools
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from cvae.config.experiment import Experiment
from cvae.files.file_lock import file_lock
from cvae.files.paths import write_atomically
from cvae.run import journal
from slurm.ray_cluster import PROBLEM, connect, trouble
from workflows.sweeps.directory import LISTED, SweepDirectory, run_of
from workflows.sweeps.sweep_file import Space, Sweep, seeds
from workflows.sweeps.trial import TrialRun
from workflows.sweeps.trial_log import Book, known_to_tune

# A lost node, a killed worker: nothing that the trial has done.
_MOST_LOSSES = 5
# A driver that was just killed, or told to end, may need so long to be gone.
_LOCK_PATIENCE_S = 100.0
# Actors import torch and Ray, perhaps from a cold network file system.
_NOTICE_S = 60.0
_START_PATIENCE_S = 300.0
_stopping = threading.Event()
_log = logging.getLogger("sweep")


def main(folder: Path, slots: int, gpus_per_trial: float) -> int:
    """Exit status 0: every trial has ended, however it ended."""
    signal.signal(signal.SIGTERM, _stop)
    os.environ.update(
        TUNE_GLOBAL_CHECKPOINT_S="3",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",  # a failed trial has none
        TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    )
    sweep = SweepDirectory(folder)
    _end_with_parent()
    logging.basicConfig(format="%(message)s")
    for name in (_log.name, "slurm"):
        logging.getLogger(name).setLevel(logging.INFO)
    refusal = f"{sweep.name}: another driver is at work on it"
    with file_lock(folder / "driver.lock", _LOCK_PATIENCE_S, refusal), connect() as there:
        threading.Thread(target=_watch_start, args=(sweep,), daemon=True).start()
        # Of a Ray that was there before, the smallest node says how many trials share one.
        slots = slots if there is None else max(1, int(there / gpus_per_trial))
        tuner(sweep, slots, gpus_per_trial).fit()
        if not _stopping.is_set():
            # A trial that was noted, but not by Ray Tune, before a driver was killed: it was drawn anew.
            known = known_to_tune(sweep)
            sweep.write_trials([one for one in sweep.trials() if one.ended or one.id in known])
    return 0 if sweep.trials() and all(trial.ended for trial in sweep.trials()) else 1


def _watch_start(sweep: SweepDirectory) -> None:
    """Ends this process if no trial starts: Ray Tune would wait for ever, and say nothing."""
    ray_folder = Path(os.environ["RAY_TMPDIR"])
    began = time.monotonic()
    for limit_s in (_NOTICE_S, _START_PATIENCE_S):
        if _stopping.wait(began + limit_s - time.monotonic()) or _has_started(sweep):
            return
        text = f"no trial has started for {limit_s:.0f} s"
        if error := trouble(ray_folder):
            text += f"; Ray's log: {error}"
        _log.error("%s", text)
    if "CVAE_RAY_ADDRESS" not in os.environ:  # there others may have all GPUs for days
        write_atomically(ray_folder / PROBLEM, text)
        os._exit(1)


def _has_started(sweep: SweepDirectory) -> bool:
    return any(trial.status != "queued" for trial in sweep.trials())


def _stop(*_: Any) -> None:
    """Told to stop, Tune notes where every trial is and ends them; each saves first."""
    _stopping.set()
    os.kill(os.getpid(), signal.SIGUSR1)


def _end_with_parent() -> None:
    """What waits for this process has been killed: nobody would know of it any more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def tuner(sweep: SweepDirectory, slots: int, gpus_per_trial: float) -> Any:
    """Ray Tune's, as it was left in the sweep's folder, or a new one."""
    settings, experiment = sweep.sweep(), sweep.experiment()
    ranks = max(1, int(gpus_per_trial))
    run = tune.with_parameters(TrialRun, sweep=str(sweep.path), ranks=ranks, slots=slots)
    run = tune.with_resources(run, {"CPU": 0, "GPU": gpus_per_trial})
    # Killed before it has noted a single trial, Ray Tune would go on with an empty space.
    if tune.Tuner.can_restore(str(sweep.ray)) and known_to_tune(sweep):
        _log.info("going on with %s", sweep.name)
        return tune.Tuner.restore(str(sweep.ray), run, resume_errored=True)
    shutil.rmtree(sweep.ray, ignore_errors=True)
    book = Book(sweep.path)
    return tune.Tuner(
        run,
        param_space=param_space(settings, experiment),
        tune_config=tune.TuneConfig(
            search_alg=searcher(settings),
            scheduler=scheduler(settings, experiment, sweep.path),
            num_samples=settings.search.samples,
            max_concurrent_trials=settings.concurrency,
            time_budget_s=settings.hours and settings.hours * 3600,
            reuse_actors=False,
            trial_name_creator=book.name,
            trial_dirname_creator=lambda trial: trial.trial_id,
            **metric_of(settings),
        ),
        run_config=tune.RunConfig(
            name=sweep.ray.name,
            storage_path=str(sweep.path),
            callbacks=[book],
            # The runs keep their own; Tune asks for a pointer to one where it has a trial change over.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=_MOST_LOSSES),
            verbose=0,
        ),
    )


def metric_of(sweep: Sweep) -> dict[str, str]:
    return {"metric": sweep.metric, "mode": sweep.mode}


def param_space(sweep: Sweep, experiment: Experiment) -> dict[str, Any]:
    """Of the listed keys all combinations, under one name; of the drawn keys their distributions."""
    lists = {
        key: space.grid or seeds(experiment, space.seeds or 0)
        for key, space in sweep.space.items()
        if space.kind in ("grid", "seeds")
    }
    found = {key: _domain(space) for key, space in sweep.space.items() if key not in lists}
    if lists:
        combinations = [
            dict(zip(reversed(lists), values, strict=True))
            for values in itertools.product(*reversed(lists.values()))
        ]
        if sweep.scheduler.name == "asha":
            # It compares a trial with those before it: in an order in which they get better and better, as
            # of learning rates that grow, each would be among the best so far and go on.
            random.Random(sweep.search.seed).shuffle(combinations)
        found[LISTED] = tune.grid_search(combinations)
    return found


def _domain(space: Space) -> Any:
    """Numbers without a point are drawn as whole numbers, both ends included."""
    if space.choice is not None:
        return tune.choice(space.choice)
    low, high = space.uniform or space.loguniform or (0, 0)
    whole = isinstance(low, int) and isinstance(high, int)
    if space.uniform is not None:
        return tune.randint(low, high + 1) if whole else tune.uniform(low, high)
    return tune.lograndint(low, high + 1) if whole else tune.loguniform(low, high)


def searcher(sweep: Sweep) -> Any:
    if sweep.search.name == "optuna":
        from optuna.samplers import TPESampler
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(sampler=TPESampler(seed=sweep.search.seed), **metric_of(sweep))
    return BasicVariantGenerator(
        random_state=sweep.search.seed, max_concurrent=sweep.concurrency or 0
    )


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """Ray Tune forgets a scheduler's state when its driver ends; the runs' journals have all of it."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(**settings)
        self.folder = folder

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for told in SweepDirectory(self.folder).trials():
            if told.id == trial.trial_id:
                for line in journal.read(run_of(told).journal_file)[0]:
                    if line["kind"] == "epoch":
                        value = self._metric_op * line["metrics"][self._metric]
                        self._trial_info[trial.trial_id].on_result(trial, line["epoch"], value)


def scheduler(sweep: Sweep, experiment: Experiment, folder: Path) -> Any:
    settings = sweep.scheduler
    if settings.name == "asha":
        return _Asha(
            folder,
            time_attr="epoch",
            max_t=experiment.training.epochs,
            grace_period=settings.grace_epochs,
            reduction_factor=settings.reduction_factor,
        )
    if settings.name == "pbt":
        return PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=settings.every_epochs,
            hyperparam_mutations={key: _domain(sweep.space[key]) for key in settings.mutate},
        )
    return FIFOScheduler()


if __name__ == "__main__":
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        status = main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    finally:
        ray.shutdown()
    sys.exit(status)
