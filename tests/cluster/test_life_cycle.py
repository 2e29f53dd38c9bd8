"""One run through what a run meets on SLURM; nobody helps it."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from cvae.config.experiment import Experiment
from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import attempts, job_state
from slurm import cluster_file as clusters
from slurm.attempts import Attempt
from slurm.cluster_file import Place, Placement
from tests.conftest import tiny_experiment
from tests.helpers.ranks import slurm_rank
from tests.helpers.waiting import until
from tests.testcluster import Cluster
from workflows import runs
from workflows.jobs.run_state import last_submission
from workflows.jobs.submission import submit_new

pytestmark = pytest.mark.cluster


def attempts_of(run: RunDirectory) -> list[Attempt]:
    submission = last_submission(run)
    assert submission is not None
    return attempts.read(run.logs, submission.job_id)


def lines(run: RunDirectory, kind: str) -> list[dict]:  # type: ignore[type-arg]
    return [line for line in journal.read(run.journal_file)[0] if line["kind"] == kind]


def end(run: RunDirectory) -> None:
    """A test that has failed leaves no job behind that goes on for ever."""
    submission = last_submission(run)
    if submission is not None and job_state.look(submission).alive:
        runs.main(["cancel", run.name])


def until_trained(run: RunDirectory, starts: int) -> None:
    """The start of that number, and then a new checkpoint."""
    until(lambda: len(lines(run, "start")) >= starts)
    before = len(lines(run, "checkpoint"))
    until(lambda: len(lines(run, "checkpoint")) > before)


def assert_shown_without_accounting_and_queue(
    run: RunDirectory,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A running job is listed and shown where sacct is missing, and also while squeue fails."""
    folder.mkdir()
    for name in ("squeue", "scontrol", "sinfo"):
        (folder / name).symlink_to(shutil.which(name) or "")
    gone = "slurm_load_jobs error: Unable to contact slurm controller"
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(folder))
        for status in ("running", f"unknown: SLURM says: {gone}"):
            capsys.readouterr()
            assert runs.main(["list"]) == runs.main(["show", run.name]) == 0
            shown = capsys.readouterr().out
            assert shown.splitlines()[1].split()[:2] == [run.name, status.split(":")[0]]
            assert re.search(rf"^status +{status}", shown, re.MULTILINE)
            assert re.search("^ranks +2 × cpu", shown, re.MULTILINE)
            (folder / "squeue").unlink()
            (folder / "squeue").write_text(f"#!/bin/sh\necho '{gone}' >&2\nexit 1\n")
            (folder / "squeue").chmod(0o755)


def test_preempted_crashed_and_cancelled(
    on_cluster: Cluster,
    tiny_store: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    config = clusters.load("testcluster").model_copy(update={"partition": "graceful"})
    plain = tiny_experiment(epochs=100_000, eval_every=100_000, log_every=20)
    experiment = Experiment.model_validate({**plain, "checkpoint": {"every_steps": 100}})
    place = Place("testcluster", config, "requested")
    run = submit_new("r", experiment, place, Placement(1, 2), gpus=2)
    request.addfinalizer(lambda: end(run))
    until_trained(run, 1)
    assert_shown_without_accounting_and_queue(run, home / "site", monkeypatch, capsys)

    # In this partition a preempted job gets a signal and time; going on is its own business.
    command = ["srun", "--partition=urgent", "--nodes=2", "--gpus-per-node=4", "hostname"]
    on_cluster.command(*command)
    until_trained(run, 2)
    stopped = lines(run, "end")[-1]
    assert stopped["status"] == "stopped"
    assert lines(run, "start")[-1]["step"] == stopped["step"], "not a step was lost"

    killed = time.time()
    slurm_rank(run, 1).send_signal(signal.SIGKILL)
    until(lambda: len(attempts_of(run)) == 3)
    assert (attempts_of(run)[1].ended or 0) - killed < 60
    until_trained(run, 3)
    assert [one.cause for one in attempts_of(run)] == ["preempted", "crash", None]
    crash = attempts_of(run)[1].end
    assert crash is not None
    node = crash.node
    assert f"rank 1 on {node}: killed (SIGKILL)" in lines(run, "end")[-1]["reason"]
    assert len({line["code"] for line in lines(run, "start")}) == 1

    # To cancel is to stop, and not to be preempted.
    assert runs.main(["cancel", "r"]) == 0
    submission = last_submission(run)
    assert submission is not None
    until(lambda: not job_state.look(submission).alive)
    assert (attempts_of(run)[-1].cause, attempts_of(run)[-1].restarts) == ("cancelled", False)
    assert os.listdir(run.checkpoints)
    capsys.readouterr()
    assert runs.main(["show", "r"]) == 0
    shown = capsys.readouterr().out
    for words in ("preempted: SIGTERM at step", f"rank 1 on {node}: killed"):
        assert words in shown
