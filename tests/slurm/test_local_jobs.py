"""Real jobs of real processes on this machine, through submitit."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cvae.errors import in_words
from slurm import attempts, executors, job_state
from slurm.attempts import AttemptEnd, Cause, log_file
from slurm.cluster_file import Placement
from slurm.executors import Job
from slurm.failure_diagnosis import first_failure
from slurm.job_state import Submission
from slurm.local_jobs import DetachedExecutor
from slurm.rank_process import run
from slurm.supervision import Supervision
from tests.conftest import PROJECT_ROOT
from tests.helpers.local_place import HERE
from tests.helpers.waiting import until


@pytest.fixture
def start(tmp_path: Path) -> Callable[[str, int], Submission]:
    def submit(function: str, ranks: int) -> Submission:
        target = f"tests.helpers.job_targets:{function}"
        env = {"PYTHONPATH": str(PROJECT_ROOT)}
        job = Job("test", tmp_path, target, (tmp_path,), env)
        return executors.submit(job, HERE, Placement(1, ranks), gpus=8)

    return submit


def wait_for_end(submission: Submission) -> None:
    until(lambda: not job_state.look(submission).alive)


def test_ranks_are_told_their_place_in_a_session_of_their_own(
    start: Callable[[str, int], Submission], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # submitit would number the GPUs itself; what the user has chosen must reach the ranks as it is.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f2a,GPU-77b1")
    monkeypatch.setenv("WORLD_SIZE", "64")
    submission = start("report", 2)
    wait_for_end(submission)

    facts_of_ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [facts["RANK"] for facts in facts_of_ranks] == ["0", "1"]
    assert [facts["LOCAL_RANK"] for facts in facts_of_ranks] == ["0", "1"]
    for facts in facts_of_ranks:
        assert facts["WORLD_SIZE"] == facts["LOCAL_WORLD_SIZE"] == "2"
        assert facts["MASTER_ADDR"] == "127.0.0.1"
        assert facts["COLOUR"] == "blue"
        assert facts["CUDA_VISIBLE_DEVICES"] == "GPU-8f2a,GPU-77b1"
        assert facts["session"] == str(submission.pid) != str(os.getsid(0))
    assert len({facts["MASTER_PORT"] for facts in facts_of_ranks}) == 1
    assert first_failure(tmp_path, submission.job_id) is None


def test_ending_a_job_lets_every_rank_save(
    start: Callable[[str, int], Submission], tmp_path: Path
) -> None:
    submission = start("wait", 2)
    until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    assert job_state.look(submission).phase == "running"
    state = job_state.end(submission, 30, lambda text: None)
    assert state.phase == "ended"
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_job_is_alive_as_long_as_one_of_its_ranks(
    start: Callable[[str, int], Submission], tmp_path: Path
) -> None:
    submission = start("wait", 1)
    until((tmp_path / "pid-0").exists)
    os.kill(submission.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert job_state.look(submission).alive
    assert not job_state.end(submission, 30, lambda text: None).alive
    assert (tmp_path / "saved-0").exists()


def test_a_dead_rank_takes_the_others_with_it_and_is_named(tmp_path: Path) -> None:
    executor = DetachedExecutor(tmp_path)
    env = {"PYTHONPATH": str(PROJECT_ROOT), "CVAE_MASTER_PORT": "1"}
    executor.update_parameters(tasks_per_node=2, env=env, patience_s=0.5)
    job = executor.submit(run, "tests.helpers.job_targets:wait", tmp_path)
    until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    until(job.done)
    failure = first_failure(tmp_path, job.job_id)
    assert failure is not None
    assert failure.end == AttemptEnd(Cause.CRASH, os.uname().nodename, 1, ("SIGKILL",))


def test_the_rank_that_caused_it_is_named_and_not_the_one_that_noticed(
    start: Callable[[str, int], Submission], tmp_path: Path
) -> None:
    submission = start("second_raises", 2)
    wait_for_end(submission)
    failure = first_failure(tmp_path, submission.job_id)
    assert failure is not None
    assert (failure.rank, failure.end.message) == (1, "ValueError: the cause")
    assert any("the cause" in line for line in failure.tail)


def test_out_of_memory_is_told_apart(
    start: Callable[[str, int], Submission], tmp_path: Path
) -> None:
    submission = start("hoard", 1)
    wait_for_end(submission)
    failure = first_failure(tmp_path, submission.job_id)
    assert failure is not None
    assert failure.end.message.startswith("out of memory: RuntimeError: ")
    assert str(failure).startswith(f"rank 0 on {os.uname().nodename}: out of memory: ")


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("a poem: out of memory"), False),
    ],
)
def test_which_exceptions_say_that_memory_ran_out(error: Exception, out_of_memory: bool) -> None:
    assert in_words(error).startswith("out of memory: ") == out_of_memory
    assert in_words(error).endswith(f"{type(error).__name__}: {error}")


def start_supervised(folder: Path, function: str) -> Submission:
    place = HERE._replace(config=HERE.config.model_copy(update={"max_restarts": 1}))
    supervision = Supervision(str(folder / "step-*"), "tests.helpers.job_targets:note", str(folder))
    env = {"PYTHONPATH": str(PROJECT_ROOT)}
    job = Job("test", folder, f"tests.helpers.job_targets:{function}", (folder,), env, supervision)
    return executors.submit(job, place, Placement(1, 1), gpus=1)


def test_a_job_that_was_asked_to_end_does_not_restart(tmp_path: Path) -> None:
    submission = start_supervised(tmp_path, "sleep")
    until((tmp_path / "pid-0").exists)
    job_state.end(submission, 30, lambda text: None)
    [attempt] = attempts.read(tmp_path, submission.job_id)
    assert (attempt.cause, attempt.restarts) == ("crash", False)


@pytest.mark.parametrize(("function", "ends"), [("stumble", 3), ("segfault", 2)])
def test_it_restarts_while_that_brings_progress(tmp_path: Path, function: str, ends: int) -> None:
    # Pids come again, in a container soon: an old job of this one's was cancelled.
    for pid in range(os.getpid(), os.getpid() + 3000):
        attempts.mark_cancelled(tmp_path, str(pid))
    submission = start_supervised(tmp_path, function)
    wait_for_end(submission)
    ended = attempts.read(tmp_path, submission.job_id)
    assert [one.restarts for one in ended] == [True] * (ends - 1) + [False]
    assert {one.cause for one in ended[:-1]} == {"crash"}
    noted = (tmp_path / "noted").read_text().splitlines()
    if function == "stumble":
        assert ended[-1].cause == "finished"
        assert [(tmp_path / f"step-{number}").read_text() for number in range(3)] == ["", "1", "1"]
        assert len(noted) == 2
    else:
        assert "Segmentation fault (SIGSEGV), restarts True" in noted[0]
        assert "2 attempts in a row brought no new checkpoint, restarts False" in noted[1]
        log = log_file(tmp_path, submission.job_id, 0).read_text()
        assert "Fatal Python error: Segmentation fault" in log


@pytest.mark.parametrize(
    ("function", "end"),
    [("refuse", "rank 0 failed: 2"), ("unhappy", "rank 0 failed: 1")],
)
def test_bad_ends_are_exit_codes_and_bad_input_is_one_line(
    start: Callable[[str, int], Submission], tmp_path: Path, function: str, end: str
) -> None:
    submission = start(function, 1)
    wait_for_end(submission)
    assert end in (tmp_path / "controller.out").read_text()
    log = log_file(tmp_path, submission.job_id, 0).read_text()
    assert "Traceback" not in log
    assert ("error: the rope is too short\n" in log) == (function == "refuse")
