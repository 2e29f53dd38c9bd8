"""What happens around a run between two attempts."""

from pathlib import Path

import pytest

from cvae.config.experiment import Experiment
from cvae.files.file_lock import file_lock
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.tracking import mlflow_mirror
from cvae.training.record_failure import note_bad_end
from tests.conftest import tiny_experiment
from tests.helpers.ranks import lines

KILLED = "rank 1 on n2: Killed"


@pytest.fixture
def run(home: Path) -> RunDirectory:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    journal = Journal(run.journal_file)
    journal.append("start", step=40)
    journal.append("step", step=57, metrics={"train/loss": 1.0})
    journal.close()
    return run


def test_the_cause_becomes_the_journals_last_line(run: RunDirectory) -> None:
    note_bad_end(str(run.path), "rank 3 on n2: Killed", "", restarts=True)
    (end,) = lines(run, "end")
    assert (end["status"], end["step"], end["reason"]) == ("failed", 57, "rank 3 on n2: Killed")


@pytest.mark.parametrize("restarts", [True, False])
def test_a_run_that_restarts_pushes_to_mlflow_itself(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, restarts: bool
) -> None:
    mirrored: list[Path] = []

    class Mirror:
        def __init__(self, path: Path):
            mirrored.append(path)

        def finish(self, patience_s: float) -> int:
            assert lines(run, "end")
            return 0

    monkeypatch.setattr(mlflow_mirror, "start_mirror", Mirror)
    note_bad_end(str(run.path), "boom", "", restarts)
    assert mirrored == [run.path] * (not restarts)


def test_a_reason_that_rank_0_has_written_is_not_written_again(run: RunDirectory) -> None:
    missing = "no such store"
    for reason, message in ((missing, ""), (f"rank 1 on n2: {missing}", missing), (KILLED, "")):
        note_bad_end(str(run.path), reason, message, restarts=True)
    assert [end["reason"] for end in lines(run, "end")] == [missing, KILLED]


def test_a_rank_that_lives_on_out_of_reach_is_the_only_writer(run: RunDirectory) -> None:
    with file_lock(run.path / "train.lock"):
        note_bad_end(str(run.path), "node n1 failed", "", restarts=True)
    assert lines(run, "end") == []
