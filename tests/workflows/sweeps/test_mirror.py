"""A sweep whose mirror could not finish, and the locks of a sweep."""

from contextlib import closing
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files.file_lock import file_lock
from cvae.run.journal import Journal
from tests.conftest import tiny_experiment
from tests.helpers.trained_runs import make_run
from workflows import runs
from workflows import sweep as sweep_command
from workflows.sweeps import mirror
from workflows.sweeps.directory import SweepDirectory, Trial
from workflows.sweeps.sweep_file import Sweep

SPACE = {"name": "s", "experiment": "tiny.yaml", "space": {"seed": {"grid": [1, 2]}}}


@pytest.fixture
def finished(tiny_store: Path) -> SweepDirectory:
    """A sweep of two finished trials that is not in MLflow."""
    experiment = Experiment.model_validate(tiny_experiment())
    sweep = SweepDirectory.create("s", Sweep.model_validate(SPACE), experiment)
    names = ["s-00", "s-01"]
    for name in names:
        with closing(Journal(make_run(name).journal_file)) as journal:
            journal.append("start", step=0)
            journal.append("step", step=7, metrics={"train/loss": 1.0})
            journal.append("end", status="finished", step=7, reason="")
    trials = [
        Trial(n, name, name, {"seed": n}, "finished", runs=[name]) for n, name in enumerate(names)
    ]
    sweep.write_trials(trials)
    return sweep


def test_sync_writes_a_sweep_and_its_parent(
    finished: SweepDirectory, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mirror.behind(finished) == 3
    assert runs.main(["sync", "s"]) == 0
    assert "MLflow has all of s: 2 trials" in capsys.readouterr().out
    assert mirror.behind(finished) == 0
    # A trial's run is found to belong to its sweep, whose parent it gets.
    assert [getattr(mirror.sweep_of(run), "name", None) for run in ("s-01", "other")] == ["s", None]
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(finished.experiment().name)
    known = client.search_runs([experiment.experiment_id])
    parents = [run for run in known if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FINISHED"]
    children = [run for run in known if run not in parents]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted(run.info.run_name for run in children) == ["s-00", "s-01"]
    assert all(run.info.status != "RUNNING" for run in children)


def test_a_mirror_at_work_is_left_alone(
    finished: SweepDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_PATIENCE_AFTER_END_S", 0.0)
    with (
        file_lock(finished.path / "mirror.lock"),
        pytest.raises(UserError, match="s: its mirror is at work, nothing to sync"),
    ):
        mirror.sync(finished)


def test_only_one_process_submits_a_sweep(finished: SweepDirectory) -> None:
    with (
        file_lock(finished.path / "launch.lock"),
        pytest.raises(UserError, match="s is being launched, resumed or cancelled by another"),
    ):
        sweep_command.main(["--resume", "s"])
    assert finished.launches() == []
