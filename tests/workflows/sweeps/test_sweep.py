"""sweep.py as a user runs it: real trials of tiny runs with a local Ray."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cvae.run import journal
from cvae.run.directory import RunDirectory
from tests.helpers.sweeping import sweep, trials, write
from workflows.sweeps.directory import Trial

pytestmark = pytest.mark.timeout(280)


def test_trials_are_runs_and_a_failed_one_is_reported(place: Path) -> None:
    space = {
        "model.latent": {"grid": ["vector", "spatial"]},
        "optimizer.lr": {"grid": [1e-3, 1e30]},
    }
    status, output = sweep(write(place, space), "--name", "first")
    assert status == 0, output
    by_values = {tuple(trial.values.values()): trial for trial in trials("first")}
    assert len(by_values) == 4
    for (latent, lr), trial in by_values.items():
        if latent == "spatial":
            assert trial.status == "failed"
            assert "needs feature maps" in trial.reason
            assert not (place / "runs" / trial.run).exists()
        elif lr > 1:
            assert trial.status == "failed"
            assert "not finite" in trial.reason
        else:
            assert trial.status == "finished"
            run = RunDirectory.open(trial.run)
            epochs = [x for x in journal.read(run.journal_file)[0] if x["kind"] == "epoch"]
            assert trial.best == min(line["metrics"]["val/loss"] for line in epochs)
            assert [line["step"] for line in epochs] == [10, 20, 30]
    finished = [trial for trial in by_values.values() if trial.status == "finished"]
    best = min(finished, key=lambda trial: trial.best or 0.0)
    assert f"{best.run}, val/loss {best.best:.2f}" in output
    assert "in full  python workflows/launch.py" in output
    assert "Traceback" not in output
    _check_mlflow(place, by_values)


def _check_mlflow(home: Path, by_values: dict[Any, Trial]) -> None:
    """Checks that each run is once below one parent, with every point of its journal."""
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["first"]
    assert parents[0].info.status == "FINISHED"
    assert parents[0].data.metrics["trials/failed"] == 3
    children = {run.info.run_name: run for run in runs if run.info.run_id != parents[0].info.run_id}
    made = {trial.run for trial in by_values.values() if (home / "runs" / trial.run).exists()}
    assert set(children) == made
    for name, child in children.items():
        assert child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert child.data.tags["sweep"] == "first"
        lines = journal.read(RunDirectory.open(name).journal_file)[0]
        points = client.get_metric_history(child.info.run_id, "val/loss")
        assert sorted(x.step for x in points) == [x["step"] for x in lines if x["kind"] == "epoch"]
    # Only the sweep has written to MLflow.
    assert not list(home.glob("runs/*/logs/mlflow.log"))


def test_asha_stops_the_worst_trials_early(place: Path) -> None:
    space = {"optimizer.lr": {"grid": [1e-2, 1e-6, 1e-8]}}
    scheduler = {"name": "asha", "grace_epochs": 2, "reduction_factor": 2}
    training = {"epochs": 200, "eval_every": 2, "log_every": 50}
    file = write(place, space, scheduler=scheduler, training=training, concurrency=1)
    status, output = sweep(file, "--name", "asha")
    assert status == 0, output
    by_rate = {trial.values["optimizer.lr"]: trial for trial in trials("asha")}
    assert by_rate[1e-2].status == "finished"
    assert {by_rate[lr].status for lr in (1e-6, 1e-8)} == {"stopped early"}
    assert sum(by_rate[lr].epoch for lr in (1e-6, 1e-8)) < 60
    assert f"{by_rate[1e-2].run}, val/loss" in output
    for lr in (1e-6, 1e-8):
        run = RunDirectory.open(by_rate[lr].run)
        assert journal.read(run.journal_file)[0][-1]["status"] == "stopped"
