"""Runs the trials with Ray Tune: `python -m workflows.sweeps.driver FOLDER SLOTS GPUS_PER_TRIAL`.

A process of its own, within a running Ray cluster. It may be killed at any moment and started again.
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
from workflows.sweeps.directory import LISTED, SweepDirectory
from workflows.sweeps.sweep_file import Space, Sweep
from workflows.sweeps.trial import TrialRun
from workflows.sweeps.trial_log import TrialLog, ids_known_to_tune

# How often a trial restarts after a loss that is not its own fault: of a node or of its process.
_MOST_LOSSES = 5
# How long a driver that was killed or asked to end may need.
_LOCK_PATIENCE_S = 100.0
# Trials import torch and Ray, perhaps from a cold network file system.
_NOTICE_S = 60.0
_START_PATIENCE_S = 300.0
_stopping = threading.Event()
_log = logging.getLogger("sweep")


def main(folder: Path, slots: int, gpus_per_trial: float) -> int:
    """Returns 0 if every trial has ended, however it ended, and 1 otherwise."""
    signal.signal(signal.SIGTERM, _stop)
    os.environ.update(
        TUNE_GLOBAL_CHECKPOINT_S="3",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",  # a failed trial has no metrics
        TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S="0",
    )
    sweep = SweepDirectory(folder)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    logging.basicConfig(format="%(message)s")
    for name in (_log.name, "slurm"):
        logging.getLogger(name).setLevel(logging.INFO)
    refusal = f"{sweep.name}: another driver is at work on it"
    with file_lock(folder / "driver.lock", _LOCK_PATIENCE_S, refusal), connect() as node_gpus:
        threading.Thread(target=_watch_start, args=(sweep,), daemon=True).start()
        if node_gpus is not None:  # of the smallest node of a Ray cluster that was running before
            slots = max(1, int(node_gpus / gpus_per_trial))
        make_tuner(sweep, slots, gpus_per_trial).fit()
        if not _stopping.is_set():
            # Drop trials that an earlier driver began, but that Tune, not having saved them, drew anew.
            known = ids_known_to_tune(sweep)
            sweep.write_trials([one for one in sweep.trials() if one.ended or one.id in known])
    return 0 if sweep.trials() and all(trial.ended for trial in sweep.trials()) else 1


def _watch_start(sweep: SweepDirectory) -> None:
    """Ends this process if no trial starts: Ray Tune would wait for ever without a message."""
    ray_folder = Path(os.environ["RAY_TMPDIR"])
    began = time.monotonic()
    for limit_s in (_NOTICE_S, _START_PATIENCE_S):
        stopping = _stopping.wait(began + limit_s - time.monotonic())
        if stopping or any(trial.status != "queued" for trial in sweep.trials()):
            return
        text = f"no trial has started for {limit_s:.0f} s"
        if error := trouble(ray_folder):
            text += f"; Ray's log: {error}"
        _log.error("%s", text)
    if "CVAE_RAY_ADDRESS" not in os.environ:  # on a shared cluster all GPUs may be taken for days
        write_atomically(ray_folder / PROBLEM, text)
        os._exit(1)


def _stop(*_: Any) -> None:
    """Has Tune save its state and end the trials, each of which saves a checkpoint first."""
    _stopping.set()
    os.kill(os.getpid(), signal.SIGUSR1)


def _end_with_parent(parent: int) -> None:
    """Ends this process if the one that waits for it is killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def make_tuner(sweep: SweepDirectory, slots: int, gpus_per_trial: float) -> Any:
    """Returns Ray Tune's tuner, restored from the sweep's folder or new."""
    settings, experiment = sweep.sweep(), sweep.experiment()
    ranks = max(1, int(gpus_per_trial))
    run = tune.with_parameters(TrialRun, sweep=str(sweep.path), ranks=ranks, slots=slots)
    run = tune.with_resources(run, {"CPU": 0, "GPU": gpus_per_trial})
    # If it was killed before it saved a trial, Tune would restore an empty space.
    if tune.Tuner.can_restore(str(sweep.ray)) and ids_known_to_tune(sweep):
        try:
            tuner = tune.Tuner.restore(str(sweep.ray), run, resume_errored=True)
        except (ImportError, AttributeError) as error:
            # Pickled by another version of the code. A new tuner draws the same trials, whose runs go on.
            _log.warning("Ray Tune's state cannot be read (%s); beginning a new one", error)
        else:
            _log.info("going on with %s", sweep.name)
            return tuner
    shutil.rmtree(sweep.ray, ignore_errors=True)
    trial_log = TrialLog(sweep.path)
    return tune.Tuner(
        run,
        param_space=param_space(settings, experiment),
        tune_config=tune.TuneConfig(
            search_alg=searcher(settings),
            scheduler=scheduler(settings, experiment, sweep),
            num_samples=settings.search.samples,
            max_concurrent_trials=settings.concurrency,
            time_budget_s=settings.hours and settings.hours * 3600,
            reuse_actors=False,
            trial_name_creator=trial_log.name,
            trial_dirname_creator=lambda trial: trial.trial_id,
            metric=settings.metric,
            mode=settings.mode,
        ),
        run_config=tune.RunConfig(
            name=sweep.ray.name,
            storage_path=str(sweep.path),
            callbacks=[trial_log],
            # The runs keep their own checkpoints; Tune requests a pointer to one when it needs it.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=_MOST_LOSSES),
            verbose=0,
        ),
    )


def param_space(sweep: Sweep, experiment: Experiment) -> dict[str, Any]:
    """Returns all combinations of the listed keys as one grid, and the distributions of the drawn keys."""
    lists = {
        key: space.grid or list(range(experiment.seed, experiment.seed + (space.seeds or 0)))
        for key, space in sweep.space.items()
        if space.kind in ("grid", "seeds")
    }
    domains = {key: _domain(space) for key, space in sweep.space.items() if key not in lists}
    if lists:
        combinations = [
            dict(zip(reversed(lists), values, strict=True))
            for values in itertools.product(*reversed(lists.values()))
        ]
        if sweep.scheduler.name == "asha":
            # ASHA compares a trial with earlier ones. If each were better than the last, as in order of
            # the learning rate, all of them would continue.
            random.Random(sweep.search.seed).shuffle(combinations)
        domains[LISTED] = tune.grid_search(combinations)
    return domains


def _domain(space: Space) -> Any:
    """Returns a distribution; between two integers it is over integers, both ends included."""
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

        sampler = TPESampler(seed=sweep.search.seed)
        return OptunaSearch(sampler=sampler, metric=sweep.metric, mode=sweep.mode)
    return BasicVariantGenerator(
        random_state=sweep.search.seed, max_concurrent=sweep.concurrency or 0
    )


class _Asha(ASHAScheduler):  # type: ignore[misc]
    """ASHA that replays the runs' journals: Ray Tune loses a scheduler's state when its driver ends."""

    def __init__(self, sweep: SweepDirectory, **settings: Any) -> None:
        super().__init__(**settings)
        self.sweep = sweep

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for entry in self.sweep.trials():
            if entry.id == trial.trial_id:
                for line in journal.read(entry.run_directory.journal_file)[0]:
                    if line["kind"] == "epoch":
                        value = self._metric_op * line["metrics"][self._metric]
                        self._trial_info[trial.trial_id].on_result(trial, line["epoch"], value)


def scheduler(settings: Sweep, experiment: Experiment, sweep: SweepDirectory) -> Any:
    options = settings.scheduler
    if options.name == "asha":
        return _Asha(
            sweep,
            time_attr="epoch",
            max_t=experiment.training.epochs,
            grace_period=options.grace_epochs,
            reduction_factor=options.reduction_factor,
        )
    if options.name == "pbt":
        return PopulationBasedTraining(
            time_attr="epoch",
            perturbation_interval=options.every_epochs,
            hyperparam_mutations={key: _domain(settings.space[key]) for key in options.mutate},
        )
    return FIFOScheduler()


if __name__ == "__main__":
    log_format = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format=log_format)
    try:
        status = main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
    finally:
        ray.shutdown()
    sys.exit(status)
