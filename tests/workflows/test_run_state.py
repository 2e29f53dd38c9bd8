"""How journal and queue together make a run's status."""

import pytest

from cvae.training.journal_lines import Line
from slurm.client import JobState
from workflows.run_state import judge

START: Line = {"kind": "start", "time": 100.0}
STOPPED: Line = {"kind": "end", "time": 200.0, "status": "stopped", "reason": "SIGTERM at step 9"}
FINISHED: Line = {"kind": "end", "time": 200.0, "status": "finished", "reason": ""}
FAILED: Line = {"kind": "end", "time": 200.0, "status": "failed", "reason": "NaN at step 9"}
QUEUED = JobState("queued", "PENDING", "Priority")
RUNNING = JobState("running", "RUNNING", "node1", start=90.0)
RESTARTED = JobState("running", "RUNNING", "node1", start=230.0)
COMPLETED = JobState("ended", "COMPLETED")
CANCELLED = JobState("ended", "CANCELLED")
TIMEOUT = JobState("ended", "TIMEOUT")
UNKNOWN = JobState("unknown", "UNKNOWN", "SLURM does not answer")


@pytest.mark.parametrize(
    ("marks", "job", "status"),
    [
        ([], QUEUED, "queued"),
        ([], RUNNING, "starting"),
        ([START], RUNNING, "running"),
        ([START, FINISHED], RUNNING, "finished"),
        ([START, FINISHED], COMPLETED, "finished"),
        ([START, FAILED], RUNNING, "failed"),
        ([START, STOPPED], COMPLETED, "stopped"),
        ([START, STOPPED], CANCELLED, "stopped"),
        ([START, STOPPED], RUNNING, "stopping"),
        # Preempted: SLURM has put it back, and then started it again.
        ([START, STOPPED], QUEUED, "queued"),
        ([START, STOPPED], RESTARTED, "starting"),
        ([START, STOPPED, START], RESTARTED, "running"),
        ([], CANCELLED, "cancelled"),
        ([START], CANCELLED, "cancelled"),
        ([START], TIMEOUT, "died"),
        ([], COMPLETED, "died"),
        ([START], UNKNOWN, "unknown"),
        ([START, FINISHED], UNKNOWN, "finished"),
    ],
)
def test_status(marks: list[Line], job: JobState, status: str) -> None:
    assert judge(marks, job, cancelled=False).status == status


def test_a_local_job_that_was_cancelled_early_did_not_die() -> None:
    ended = JobState("ended", "ENDED")
    assert judge([], ended, cancelled=True).status == "cancelled"
    assert judge([], ended, cancelled=False).status == "died"
