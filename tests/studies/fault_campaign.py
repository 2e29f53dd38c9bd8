"""Injects random faults into one run on the test cluster, and checks that nothing is lost.

Prints a Markdown row per fault, then whether the weights equal those of a run without faults, and whether journal
and MLflow have every step once; exits with 1 if not. After a fault the campaign repairs what it has broken, as a
site does; it never touches the run.
"""

import argparse
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from cvae.config.experiment import Experiment
from cvae.run.directory import RunDirectory
from slurm import cluster_file as clusters
from slurm.cluster_file import Place, Placement
from tests.conftest import write_store
from tests.helpers import cluster_faults
from tests.helpers.cluster_faults import FAULTS, Field
from tests.helpers.ranks import lines
from tests.testcluster import Cluster
from workflows.jobs.run_state import newest_step, run_state
from workflows.jobs.submission import submit

# More than the fastest machine makes between two faults, so that the run does not end before the last one.
_STEPS_PER_FAULT, _PATIENCE_S = 2000, 300.0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.studies.fault_campaign", description=__doc__
    )
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), default=list(FAULTS))
    return parser


def main() -> int:
    options = parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cluster = Cluster()
    if cluster.shape() is not None:
        raise SystemExit("the test cluster is up: python -m tests.testcluster down")
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        home = Path(folder)
        try:
            # Hosts see what was mounted before they were made.
            cluster_faults.mount_disks(home)
            cluster_faults.add_scontrol(home)
            cluster.up()
            return _campaign(
                cluster, home, options.faults, random.Random(options.seed), options.only
            )
        finally:
            cluster_faults.thaw(home)
            cluster.down()
            cluster_faults.clean_up(home)


def _campaign(cluster: Cluster, home: Path, n: int, dice: random.Random, names: list[str]) -> int:
    # The undisturbed run has a file system of its own.
    for folder in (home, home / "disk"):
        write_store(folder, captioned=False)
    os.environ["CVAE_HOME"] = str(home)
    os.environ["SLURM_CONF"] = str(cluster.slurm_conf)
    experiment = _experiment(_STEPS_PER_FAULT * (n + 1))
    quiet = _undisturbed(home, experiment)
    server = cluster_faults.MlflowServer(home, cluster.machine_address)
    server.start()
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    os.environ["CVAE_HOME"] = str(home / "disk")
    run = RunDirectory.create("campaign", experiment)
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(home / "small")
    config = clusters.load("testcluster").model_copy(update={"partition": "graceful"})
    submit(run, Place("testcluster", config, ""), Placement(2, 1), gpus=2)
    field = Field(cluster, run, server, dice)
    field.wait_for_checkpoint()
    print(
        "| # | fault | at step | detected after | steps lost | resumed after |\n|---|---|---|---|---|---|"
    )
    bag: list[str] = []
    for number in range(1, n + 1):
        # Every kind comes once before any comes again.
        bag = bag or dice.sample(names, len(names))
        print(f"| {number} | {_inject(field, bag.pop())} |", flush=True)
        field.wait_for_checkpoint()
        time.sleep(dice.uniform(0, 2))
    # The rest may be most of the run, on a shared machine.
    going = ("queued", "starting", "running", "stopping")
    _wait(lambda: run_state(run).status not in going, patience_s=3600)
    _wait(lambda: not run_state(run).job.alive)
    quiet.wait()
    return _verdict(run, RunDirectory(home / "runs" / "quiet"), server.database)


def _inject(field: Field, name: str) -> str:
    step, starts = newest_step(lines(field.run, "step")), len(lines(field.run, "start"))
    fault, began = FAULTS[name], time.time()
    field.acted = began
    heal = fault.inject(field)
    if not fault.restarts:
        _wait(lambda: fault.seen(field, began))
        detected = time.time() - field.acted
        heal()
        if fault.restarts is None:
            _wait(lambda: field.has_noticed(began) or field.has_trained_since(began + detected))
        if not field.has_noticed(began):
            return f"{name} | {step:,} | {detected:.0f} s | 0 | went on"
    _wait(lambda: field.has_noticed(began))
    detected = time.time() - field.acted
    if fault.restarts:
        heal()
    _wait(lambda: len(lines(field.run, "start")) > starts)
    start = lines(field.run, "start")[starts]
    seen = [x["step"] for x in lines(field.run, "step") if x["time"] < start["time"]]
    lost = max(0, max(seen) - start["step"])
    resumed = start["time"] - field.acted
    return f"{name} | {max(seen):,} | {detected:.0f} s | {lost:,} | {resumed:.0f} s"


def _experiment(steps: int) -> Experiment:
    from tests.conftest import tiny_experiment

    plain = tiny_experiment(epochs=1e6, max_steps=steps, eval_every=200, log_every=10)
    return Experiment.model_validate({**plain, "checkpoint": {"every_steps": 100}})


def _undisturbed(home: Path, experiment: Experiment) -> "subprocess.Popen[bytes]":
    """Starts the same run undisturbed, on two ranks of this machine."""
    file = home / "quiet.yaml"
    file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")))
    words = [str(file), "--cluster", "local", "--gpus", "2", "--name", "quiet"]
    with open(home / "quiet.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, "workflows/launch.py", *words], stdout=log, stderr=log
        )


def _verdict(run: RunDirectory, quiet: RunDirectory, database: Path) -> int:
    state = run_state(run)
    last = max(path.name for path in quiet.checkpoints.glob("step-*"))
    same = all(
        (run.checkpoints / last / file.name).read_bytes() == file.read_bytes()
        for file in (quiet.checkpoints / last).glob("*.safetensors")
    )
    written, expected = _steps(run), _steps(quiet)
    query = "select step from metrics where key = 'train/loss'"
    with sqlite3.connect(database) as connection:
        mirrored = Counter(step for (step,) in connection.execute(query))
    checks = {
        f"the run is {state.status} {state.reason}": state.status == "finished",
        f"weights of {last} bit-identical to the undisturbed run's": same,
        f"{len(written)} points in the journal, each once": written == expected,
        f"{len(mirrored)} points in MLflow, each once": mirrored == expected,
    }
    print()
    for check, holds in checks.items():
        print(f"- {'yes' if holds else 'NO'}: {check}")
    return 0 if all(checks.values()) else 1


def _steps(run: RunDirectory) -> Counter[int]:
    return Counter(line["step"] for line in lines(run, "step"))


def _wait(condition: Callable[[], bool], patience_s: float = _PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not continue by itself")
        time.sleep(0.3)


if __name__ == "__main__":
    sys.exit(main())
