"""The supervisor of a job on SLURM, with a scontrol whose answers a test chooses."""

import json
import subprocess
from pathlib import Path

import pytest

from slurm import attempts, supervisor
from tests.conftest import PROJECT_ROOT
from tests.helpers.attempt_log import AT_LIMIT, JOB, begin, last_end, opened
from tests.helpers.waiting import until

KILLED_AT_LIMIT = "time limit: killed before it could save"


@pytest.fixture
def changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the file of the commands that scontrol was given to change something, one per line."""
    changes, folder = tmp_path / "changes", tmp_path / "bin"
    changes.touch()
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1 $2" in "show job") cat {tmp_path}/details;; *) echo "$@" >>{changes};; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    (tmp_path / "details").write_text(AT_LIMIT)
    return changes


def test_killed_at_the_time_limit_it_is_tried_again_while_that_brings_progress(
    changes: Path, tmp_path: Path
) -> None:
    for again in (True, False):
        begin(tmp_path)
        supervisor.at_limit(opened(tmp_path, 1))
        last = last_end(tmp_path)
        assert (last.cause, last.restarts, last.saved) == ("time limit", again, False)
        assert last.reason.startswith(KILLED_AT_LIMIT)
        # SLURM signals more than once.
        supervisor.at_limit(opened(tmp_path, 1))
        assert changes.read_text() == f"requeue {JOB}\n"
    assert last.without_progress == 2
    assert last.reason.endswith("; 2 attempts in a row brought no new checkpoint")


def test_no_rank_could_write_down_the_time_limit_so_the_next_try_does(
    changes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    begin(tmp_path)
    supervisor.at_limit(opened(tmp_path, 3))
    assert supervisor.before(opened(tmp_path)) == 0
    assert (tmp_path / "noted").read_text() == f"{KILLED_AT_LIMIT}, restarts True\n"
    assert [one.cause for one in attempts.read(tmp_path, JOB)] == ["time limit", None]


@pytest.mark.parametrize(
    "details",
    [
        "JobState=COMPLETING Reason=None Restarts=1",  # preempted, or cancelled
        "JobState=RUNNING Reason=TimeLimit Restarts=1",
        "JobState=COMPLETING Reason=TimeLimit Restarts=2",  # a later attempt, on another host
    ],
)
def test_what_else_slurm_ends_is_none_of_its_business(
    changes: Path, tmp_path: Path, details: str
) -> None:
    begin(tmp_path)
    (tmp_path / "details").write_text(details)
    supervisor.at_limit(opened(tmp_path, 3))
    assert attempts.read(tmp_path, JOB)[-1].ended is None
    assert changes.read_text() == ""


@pytest.mark.parametrize(
    ("status", "signals", "cause", "again"),
    [
        ("finished", [], "finished", False),
        ("failed", [], "failed", False),
        ("stopped", ["SIGUSR2"], "time limit", True),
    ],
)
def test_at_the_time_limit_the_ranks_own_word_counts(
    changes: Path, tmp_path: Path, status: str, signals: list[str], cause: str, again: bool
) -> None:
    begin(tmp_path)
    result = {"status": status, "reason": "at step 9", "signals": signals}
    attempts.result_file(tmp_path, JOB).write_text(json.dumps(result))
    supervisor.at_limit(opened(tmp_path, 3))
    last = last_end(tmp_path)
    assert (last.cause, last.restarts) == (cause, again)
    assert last.reason != KILLED_AT_LIMIT
    assert bool(changes.read_text()) == again


def test_a_cancelled_job_is_not_revived_by_its_time_limit(changes: Path, tmp_path: Path) -> None:
    begin(tmp_path)
    attempts.mark_cancelled(tmp_path, JOB)
    supervisor.at_limit(opened(tmp_path, 3))
    assert attempts.read(tmp_path, JOB)[-1].cause == "cancelled"
    assert changes.read_text() == ""


@pytest.mark.parametrize(
    ("details", "word", "requeued"),
    [
        ("JobState=RUNNING Restarts=1 PreemptTime=None", None, True),
        ("JobState=RUNNING Restarts=1 PreemptTime=None", "finished", False),
        ("JobState=RUNNING Restarts=1 PreemptTime=2026-11-23T19:41:51", "stopped", True),
        ("JobState=RUNNING Restarts=1 PreemptTime=None", "stopped", False),
        ("JobState=CANCELLED Restarts=1", None, False),
        ("JobState=COMPLETING Restarts=1", None, False),
        # A host that was out of reach wakes up in the middle of the next attempt.
        ("JobState=RUNNING Restarts=2 PreemptTime=None", None, False),
    ],
)
def test_only_the_present_running_try_may_requeue(
    changes: Path, tmp_path: Path, details: str, word: str | None, requeued: bool
) -> None:
    begin(tmp_path)
    (tmp_path / "details").write_text(details)
    if word is not None:
        result = {"status": word, "reason": "at step 9", "signals": ["SIGTERM"]}
        attempts.result_file(tmp_path, JOB).write_text(json.dumps(result))
    supervisor.after(opened(tmp_path, 3), 1)
    assert changes.read_text() == (f"requeue {JOB}\n" if requeued else "")


def test_the_batch_script_is_watched_and_leaves_nothing(changes: Path, tmp_path: Path) -> None:
    """The script's own lines around a stand-in for srun that, like SLURM, signals all and then waits."""
    before, after = supervisor.script_lines(tmp_path, opened(tmp_path).supervision, 3)
    begin(tmp_path)
    ready = 'until grep -q sigtimedwait "/proc/$watcher/wchan"; do sleep 0.1; done'
    signals = f'echo "$watcher" >{tmp_path}/pid; kill -TERM "$watcher" $$'
    requeued = f"until grep -q requeue {changes}; do sleep 0.1; done"
    # As at the first attempt; the supervisor's own beginning asks a whole SLURM.
    lines = [*before[4:], ready, signals, requeued, "(exit 9)", *after]
    done = subprocess.run(["bash", "-c", "\n".join(lines)], timeout=30, check=False)
    assert done.returncode == 9
    assert changes.read_text() == f"requeue {JOB}\n"
    watcher = int((tmp_path / "pid").read_text())
    until(lambda: not Path(f"/proc/{watcher}").exists())
    assert last_end(tmp_path).reason == KILLED_AT_LIMIT
