"""A sweep all of whose processes are killed; in a file of its own because it takes long."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from cvae.run.directory import RunDirectory
from tests.helpers import ranks
from tests.helpers.sweeping import start, sweep, trials, write
from workflows import sweep as sweep_command
from workflows.sweeps.directory import SweepDirectory, Trial
from workflows.sweeps.mirror import behind

pytestmark = pytest.mark.timeout(280)


def test_a_killed_sweep_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After a kill and a resume, its trials end with the results of undisturbed runs."""
    space = {"model.latent_dim": {"grid": [2, 3, 4]}}
    file = write(place, space, training={"epochs": 300, "eval_every": 100, "log_every": 50})
    process = start(file, "--name", "killed")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(trial.ended for trial in _trials_so_far("killed")):
            break
        time.sleep(0.2)
    before = {trial.run: trial.best for trial in trials("killed") if trial.ended}
    process.send_signal(signal.SIGINT)
    process.communicate()
    _kill_everything(SweepDirectory.open("killed"))
    journals = {run: (place / "runs" / run / "journal.jsonl").read_bytes() for run in before}

    status, output = sweep("--resume", "killed")
    assert status == 0, output
    after = {trial.run: trial.best for trial in trials("killed")}
    assert len(after) == 3
    assert before
    assert before.items() <= after.items()
    for run, text in journals.items():
        assert (place / "runs" / run / "journal.jsonl").read_bytes() == text

    # A trial is a run: trained alone, it has the same results.
    undisturbed = {
        run: RunDirectory.create(f"undisturbed-{run}", RunDirectory.open(run).experiment())
        for run in after
    }
    first, *others = undisturbed.values()
    ranks.train(first, 1, *others)
    for run, one in undisturbed.items():
        assert after[run] == min(x["metrics"]["val/loss"] for x in ranks.lines(one, "epoch"))
    assert sweep_command.main(["--resume", "killed"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert behind(SweepDirectory.open("killed")) == 0


def _trials_so_far(name: str) -> list[Trial]:
    folder = Path(os.environ["CVAE_HOME"]) / "sweeps" / name
    return SweepDirectory(folder).trials()


def _kill_everything(sweep: SweepDirectory) -> None:
    """Kills the job, the driver and Ray; the trials' own processes end when they notice it."""
    controller = psutil.Process(sweep.submissions()[-1].pid)
    for process in [controller, *controller.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            of_a_trial = "/runs/" in command
            if not of_a_trial:
                process.kill()
