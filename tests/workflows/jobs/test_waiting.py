"""The helper that submits a job, waits for it and reports how it ended."""

from pathlib import Path
from typing import Any

import pytest

from slurm import executors, job_state
from slurm.cluster_file import Placement
from slurm.commands import JobState
from slurm.executors import Job
from slurm.job_state import Submission
from tests.conftest import PROJECT_ROOT
from tests.helpers.local_place import HERE
from workflows.jobs import waiting
from workflows.jobs.waiting import FinishedJob, run_and_wait, waiting_text


def wait_for(folder: Path, function: str, **more: Any) -> FinishedJob:
    target = f"tests.helpers.job_targets:{function}"
    job = Job("test", folder, target, (folder,), {"PYTHONPATH": str(PROJECT_ROOT)})
    return run_and_wait(job, HERE, Placement(1, 1), 1, poll_s=0.05, **more)


def test_the_first_failure_is_reported_with_its_log(tmp_path: Path) -> None:
    phases: list[str] = []
    ended = wait_for(tmp_path, "refuse", show=lambda _, state: phases.append(state.phase))
    assert "the rope is too short" in ended.cause
    assert ended.log.endswith("_0_log.out")
    assert phases[-1] == "ended"


def test_a_job_ends_as_soon_as_it_has_done_enough(tmp_path: Path) -> None:
    begun = tmp_path / "pid-0"
    ended = wait_for(tmp_path, "wait", is_enough=begun.exists)
    assert (ended.state.phase, ended.failure) == ("ended", None)
    assert not job_state.look(ended.submission).alive


def test_an_interrupted_wait_ends_the_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "pid-0"

    def interrupt(submission: Submission, state: JobState) -> None:
        if begun.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wait_for(tmp_path, "wait", show=interrupt, kept="its parts are kept")
    assert (tmp_path / "saved-0").exists()
    assert capsys.readouterr().out.rstrip().endswith("; its parts are kept")


def test_results_that_a_network_file_system_shows_late_are_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submission = Submission(
        time=0, cluster="c", executor="slurm", job_id="7", host="h", nodes=1, gpus=1, world_size=1
    )
    monkeypatch.setattr(executors, "submit", lambda *arguments: submission)
    monkeypatch.setattr(job_state, "look", lambda _: JobState("ended", "COMPLETED"))
    answers = [True, False, False]
    ended = wait_for(tmp_path, "report", is_complete=lambda: answers.pop())
    assert (answers, ended.cause) == ([], "it ended as COMPLETED")
    monkeypatch.setattr(waiting, "_LAG_S", 0.0)
    wait_for(tmp_path, "report", is_complete=lambda: False)
    unknown = JobState("unknown", "UNKNOWN", "SLURM does not answer")
    text = waiting_text(submission, unknown, "working")
    assert text == "cannot query job 7 on c (SLURM does not answer); retrying"
