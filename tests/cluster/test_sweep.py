"""A sweep over both hosts of a real SLURM; one of them goes in the middle of it, and its trials move."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import job_state
from tests.conftest import tiny_experiment
from tests.helpers.waiting import until
from tests.testcluster import Cluster
from workflows import sweep as sweep_command
from workflows.sweeps.directory import SweepDirectory, Trial

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


@pytest.fixture
def sweep(
    on_cluster: Cluster, names_at_loopback: None, tiny_store: Path
) -> Iterator[SweepDirectory]:
    """Of four long trials at once and two that wait, submitted to both hosts."""
    home = tiny_store.parent.parent
    tree = tiny_experiment(epochs=800, eval_every=100, log_every=100)
    tree["checkpoint"] = {"every_steps": 200}
    (home / "tiny.yaml").write_text(yaml.safe_dump(tree))
    space = {"model.latent_dim": {"grid": [2, 3, 4, 5, 6, 7]}}
    keys = {"name": "s", "experiment": str(home / "tiny.yaml"), "space": space}
    (home / "sweep.yaml").write_text(yaml.safe_dump(keys))
    words = ["--cluster", "testcluster", "--nodes", "2", "--gpus", "4", "--name", "s", "--detach"]
    assert sweep_command.main([str(home / "sweep.yaml"), *words]) == 0
    sweep = SweepDirectory.open("s")
    yield sweep
    if job_state.look(sweep.submissions()[-1]).alive:
        sweep_command.main(["--cancel", "s"])


def hosts_of(trial: Trial) -> list[str]:
    lines = journal.read(RunDirectory.open(trial.run).journal_file)[0]
    return [line["hosts"][0] for line in lines if line["kind"] == "start"]


def test_trials_of_a_lost_node_move(sweep: SweepDirectory, cluster: Cluster) -> None:
    submission = sweep.submissions()[-1]
    until(lambda: trials_on(sweep, "cvae-node2"), 150)
    first = {trial.run: hosts_of(trial)[0] for trial in sweep.trials() if trial.step}
    doomed = trials_on(sweep, "cvae-node2")
    assert set(first.values()) == {"cvae-node1", "cvae-node2"}

    lost = cluster.host("cvae-node2")
    lost.power_off()
    try:
        until(lambda: len(ended(sweep)) == 6, 200)
        over = time.monotonic()
        until(lambda: not job_state.look(submission).alive, 30)  # Ray by itself would wait 60 s
        print(f"gone after {time.monotonic() - over:.1f} s", file=sys.stderr)
    finally:
        lost.power_on()
    assert {trial.status for trial in sweep.trials()} == {"finished"}
    for trial in sweep.trials():
        run = RunDirectory.open(trial.run)
        lines = journal.read(run.journal_file)[0]
        assert [x["step"] for x in lines if x["kind"] == "epoch"] == list(range(500, 4001, 500))
        if trial.run in doomed:
            assert hosts_of(trial)[-1] == "cvae-node1"
            starts = [x["step"] for x in lines if x["kind"] == "start"]
            assert starts[-1] >= 200  # from a checkpoint, not from the beginning


def trials_on(sweep: SweepDirectory, host: str) -> set[str]:
    """Runs that train there and are some checkpoints on."""
    on = [trial for trial in sweep.trials() if trial.status == "running" and trial.step >= 500]
    return {trial.run for trial in on if hosts_of(trial) == [host]}


def ended(sweep: SweepDirectory) -> list[Trial]:
    return [trial for trial in sweep.trials() if trial.ended]
