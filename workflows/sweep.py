"""Searches an experiment's keys with Ray Tune: prints the plan, submits, shows the trials, names the best.

    python workflows/sweep.py SWEEP.yaml [--nodes N --gpus G] [--gpus-per-trial F] [--cluster NAME]
                              [--address HOST:PORT] [--name SWEEP] [--dry-run] [--detach] [key=value …]
    python workflows/sweep.py --resume SWEEP [--force]     continues a sweep, or watches it if it still runs
    python workflows/sweep.py --cancel SWEEP

Exit status: 0 all trials have ended, 1 the sweep (or every trial) failed, 2 bad input (nothing is written), 3
stopped, 130 detached by Ctrl-C (the sweep goes on).
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvae import command_line
from cvae.command_line import Parser, files_and_overrides
from cvae.config.experiment import Experiment
from cvae.data.store import open_store
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import check_new_name, free_name
from slurm import attempts, cluster_file, job_state
from workflows.jobs.job_options import add_job_options
from workflows.sweeps.directory import SweepDirectory
from workflows.sweeps.sweep_file import load_sweep
from workflows.terminal.formatting import Fact, aligned, shown

if TYPE_CHECKING:
    from workflows.sweeps.submission import Allocation

# Longer than the driver, Ray and the mirror need to end after they are asked to.
_SAVE_PATIENCE_S = 150.0


def parser() -> Parser:
    parser = Parser(prog="sweep.py", description="Searches an experiment's keys with Ray Tune.")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="SWEEP.yaml | key=value",
        help="the sweep's file, and values that replace its own (search.samples=4) or its experiment's"
        " (training.epochs=2; a key of the space then has only that value)",
    )
    gpus = "one per node on SLURM; here all GPUs, or else all cores"
    add_job_options(parser, nodes=None, gpus=gpus)
    parser.add_argument(
        "--gpus-per-trial",
        type=_gpu_share,
        metavar="F",
        help="default: 1; 0.5 puts two trials on a GPU, 2 gives each trial two ranks",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a Ray cluster that runs already")
    parser.add_argument("--name", metavar="SWEEP", help="default: the file's name and the time")
    parser.add_argument("--resume", metavar="SWEEP", help="continue a sweep, or the `latest` one")
    parser.add_argument(
        "--force",
        action="store_true",
        help="with --resume: even if it is not known whether the sweep's last job has ended",
    )
    parser.add_argument(
        "--cancel", metavar="SWEEP", help="end a sweep; its trials save checkpoints first"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    parser.add_argument("--detach", action="store_true", help="submit and do not wait")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    if options.cancel:
        return _cancel(SweepDirectory.open(options.cancel))
    if options.resume:
        return _resume(SweepDirectory.open(options.resume), options)
    files, overrides = files_and_overrides(options.words)
    if len(files) != 1:
        raise UserError("name one sweep file, as configs/sweeps/demo.yaml; overrides are key=value")
    check_new_name(options.name)
    loaded = load_sweep(Path(files[0]), overrides, paths.PROJECT_ROOT)
    allocation, where = _allocate(options, loaded.experiment)
    name = options.name or free_name(loaded.sweep.name, paths.sweeps_dir())

    from workflows.jobs.submission import locked
    from workflows.sweeps import live_view, submission

    facts = submission.plan_facts(loaded, allocation, name)
    origin = " ".join([shown(Path(files[0])), *overrides])
    start = [("sweep", f"{name}, from {origin}"), ("experiment", loaded.sweep.experiment)]
    print(aligned([*start, *where, *facts]), flush=True)
    if options.dry_run:
        script = submission.sbatch_script(name, allocation)
        print(f"\n{script or '(dry run: nothing was started)'}")
        return 0
    sweep = SweepDirectory.create(name, loaded.sweep, loaded.experiment)
    try:
        with locked(sweep.path):
            submission.submit(sweep, allocation)
    except BaseException:
        if not sweep.submissions():
            shutil.rmtree(sweep.path, ignore_errors=True)
        raise
    print()
    if options.detach:
        print(f"submitted; watch it: python workflows/sweep.py --resume {sweep.name}")
        return 0
    return live_view.follow(sweep)


def _resume(sweep: SweepDirectory, options: Any) -> int:
    if options.words:
        raise UserError(
            f"--resume {sweep.name}: a sweep goes on as it is, without {options.words[0]}"
        )
    from workflows.jobs.submission import locked
    from workflows.sweeps import live_view

    with locked(sweep.path):
        is_to_be_watched = _resubmit(sweep, options)
    return live_view.follow(sweep) if is_to_be_watched else 0


def _resubmit(sweep: SweepDirectory, options: Any) -> bool:
    """Submits the sweep unless it runs or is finished. Returns whether it is to be watched."""
    from workflows.jobs.submission import unknown
    from workflows.sweeps import live_view, mirror, submission

    if submissions := sweep.submissions():
        last = submissions[-1]
        job = job_state.look(last)
        if job.phase == "unknown" and not options.force:
            raise UserError(unknown(sweep.name, last, job))
        if job.alive:
            print(f"{sweep.name} is running ({last.where})", flush=True)
            return True
        if live_view.is_finished(sweep):
            print(f"{sweep.name} is finished: {len(sweep.trials())} trials", flush=True)
            mirror.sync(sweep)  # writes what MLflow may have missed at the end
            return False
        launch = sweep.launches()[-1]
        options.address = options.address or launch["address"]
        options.gpus_per_trial = options.gpus_per_trial or launch["gpus_per_trial"]
        if options.address is None:
            options.nodes = options.nodes or last.nodes
            options.gpus = options.gpus or last.gpus
            options.cluster = options.cluster or last.cluster
    allocation, where = _allocate(options, sweep.experiment())
    print(aligned([("sweep", sweep.name), *where]), flush=True)
    submission.submit(sweep, allocation)
    return not options.detach


def _cancel(sweep: SweepDirectory) -> int:
    from workflows.jobs.submission import locked

    if not sweep.submissions():
        raise UserError(f"{sweep.name} was never submitted")
    with locked(sweep.path):
        last = sweep.submissions()[-1]
        if job_state.look(last).phase == "ended":
            raise UserError(f"{sweep.name} does not run: there is nothing to cancel")
        attempts.mark_cancelled(sweep.logs, last.job_id)
    job = job_state.end(last, _SAVE_PATIENCE_S, lambda text: print(text, flush=True))
    if job.phase != "ended":
        reason = job.reason or job.slurm_state
        print(f"{sweep.name}: whether {last.where} has ended is not known: {reason}")
        return 1
    print(f"cancelled {sweep.name} at {time.strftime('%H:%M:%S')}")
    return 0


def _allocate(options: Any, experiment: Experiment) -> "tuple[Allocation, list[Fact]]":
    """Returns where the sweep runs, and a description of it. Raises UserError if that is impossible."""
    # Before torch is imported, which takes seconds.
    open_store(experiment.data.name, experiment.data.image_size)
    from workflows.jobs.plan import locate
    from workflows.sweeps.submission import Allocation

    gpus_per_trial = options.gpus_per_trial or 1.0
    if options.address is not None:
        if options.cluster or options.nodes or options.gpus:
            raise UserError("--address: the Ray cluster there has its own nodes and GPUs")
        # Only the driver runs here.
        place, placement, _ = locate(cluster_file.Placement(1, 1), "local", options.dry_run)
        where = f"the Ray cluster at {options.address}, its driver here"
        return Allocation(place, placement, gpus_per_trial, options.address), [("where", where)]
    nodes = options.nodes or 1
    is_local = cluster_file.choose(options.cluster).config.executor == "local"
    requested = cluster_file.split(nodes, options.gpus or (4096 if is_local else nodes))
    time_limit = cluster_file.TimeLimit(options.time)
    place, placement, facts = locate(requested, options.cluster, options.dry_run, time_limit)
    if options.gpus is None:
        facts = [(name, text.splitlines()[0]) for name, text in facts]
    allocation = Allocation(place, placement, gpus_per_trial)
    allocation.check(has_gpus=not is_local or cluster_file.gpus_here() > 0)
    return allocation, facts


def _gpu_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1024:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return share


if __name__ == "__main__":
    command_line.run(main)
