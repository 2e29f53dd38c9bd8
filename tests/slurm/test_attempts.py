"""Why a try ended, and whether another follows."""

import json
from pathlib import Path

import pytest

from slurm import attempts, job_files
from slurm.attempts import Care, Cause, Ending, Try

JOB = "12"


def crashed(number: int, progress: str, node: str = "", cause: Cause = "crash") -> Try:
    return Try(number, 0.0, ["n1", "n2"], 1.0, cause, "boom", node, progress, True)


def write_result(folder: Path, status: str, reason: str) -> None:
    text = json.dumps({"status": status, "reason": reason})
    job_files.result_file(folder, JOB).write_text(text)


@pytest.mark.parametrize(
    ("result", "status", "preempted", "cause"),
    [
        (("finished", ""), 0, False, "finished"),
        (("failed", "not finite at step 3"), 1, False, "failed"),
        (("stopped", "SIGUSR2 at step 9, saved"), 0, False, "time limit"),
        (("stopped", "SIGTERM, SIGUSR2 at step 9, saved"), 0, False, "time limit"),
        (("stopped", "SIGTERM at step 9, saved"), 0, True, "preempted"),
        # Somebody's own signal: SLURM knows of no preemption.
        (("stopped", "SIGTERM at step 9, saved"), 0, False, "signal"),
        # Preempted while it was still importing.
        (None, 143, True, "preempted"),
        (None, 137, False, "crash"),
    ],
)
def test_why_a_try_ended(
    tmp_path: Path, result: tuple[str, str] | None, status: int, preempted: bool, cause: str
) -> None:
    if result is not None:
        write_result(tmp_path, *result)
    assert attempts.ending(tmp_path, JOB, status, preempted).cause == cause


@pytest.mark.parametrize("cause", ["time limit", "preempted", "crash"])
def test_a_cancelled_job_is_never_revived(tmp_path: Path, cause: str) -> None:
    if cause != "crash":
        write_result(tmp_path, "stopped", "SIGUSR2 at step 9, saved")
    attempts.mark_cancelled(tmp_path, JOB)
    end = attempts.ending(tmp_path, JOB, 1, preempted=cause == "preempted")
    assert end.cause == "cancelled"
    assert attempts.decide(end, "", [], 3)[0] is False


@pytest.mark.parametrize(("bad_input", "cause"), [(True, "bad input"), (False, "crash")])
def test_the_first_rank_to_fail_is_the_cause(tmp_path: Path, bad_input: bool, cause: str) -> None:
    reports = [
        (2.0, 1, "n2", "no such store", bad_input),
        (1.0, 0, "n1", "RuntimeError: gloo: Connection closed by peer", False),
    ]
    for when, rank, host, error, bad in reports:
        report = {"time": when, "rank": rank, "host": host, "error": error, "bad_input": bad}
        job_files.failure_file(tmp_path, JOB, rank).write_text(json.dumps(report))
    end = attempts.ending(tmp_path, JOB, 2)
    assert end == Ending(cause, "rank 1 on n2: no such store", "n2")  # type: ignore[arg-type]
    assert attempts.decide(end, "", [], 3)[0] is not bad_input


def test_a_crash_is_repeated_only_while_it_brings_progress() -> None:
    crash = Ending("crash", "boom")
    same = [crashed(number, "step-1") for number in (1, 2)]
    assert attempts.decide(crash, "step-1", same, 3)[0]
    again, told = attempts.decide(crash, "step-1", [*same, crashed(3, "step-1")], 3)
    assert not again
    assert "4 tries in a row brought no new checkpoint" in told.why
    # A new checkpoint, and it counts anew.
    assert attempts.decide(crash, "step-2", [*same, crashed(3, "step-1")], 3)[0]
    # A preemption in between is no progress, nor is it the job's fault.
    preempted = crashed(3, "step-1", cause="preempted")
    assert attempts.decide(crash, "step-1", [*same, preempted], 3)[0]
    assert not attempts.decide(crash, "step-1", [*same, preempted, crashed(4, "step-1")], 3)[0]
    assert not attempts.decide(crash, "step-1", [], 0)[0]


@pytest.mark.parametrize("cause", ["finished", "failed", "bad input", "cancelled", "signal"])
def test_what_is_never_repeated(cause: Cause) -> None:
    assert not attempts.decide(Ending(cause, ""), "step-1", [], 3)[0]


def test_preemptions_and_failing_nodes_are_no_reason_to_give_up() -> None:
    earlier = [crashed(number, "", cause="preempted") for number in range(20)]
    assert attempts.decide(Ending("preempted", ""), "", earlier, 3)[0]


def test_a_node_that_failed_twice_is_bad() -> None:
    told = [crashed(1, "a", "n1"), crashed(2, "b", "n2"), crashed(3, "c", "n2", "node")]
    assert attempts.bad_nodes(told) == ["n2"]
    assert attempts.bad_nodes([crashed(n, "a", "n1", "preempted") for n in range(3)]) == []


def test_a_try_that_slurm_ended_is_told_by_the_next(tmp_path: Path) -> None:
    care = Care(str(tmp_path / "step-*"))
    attempts.begin(tmp_path, JOB, ["n1", "n2"], 1.0, "", attempts.newest(care.progress))
    write_result(tmp_path, "stopped", "SIGTERM at step 9, saved")
    (tmp_path / "step-9").mkdir()
    progress = attempts.newest(care.progress)
    first, second = attempts.begin(tmp_path, JOB, ["n1"], 2.0, "PREEMPTED", progress)
    assert (first.cause, first.progress) == ("preempted", "step-9")
    assert "SIGTERM at step 9, saved" in first.why
    assert second.cause is None
    # The evidence of the one is not taken for that of the other.
    assert attempts.ending(tmp_path, JOB, 1).cause == "crash"

    log = job_files.log_file(tmp_path, JOB, 0)
    log.write_text("slurmstepd: error: Node failure on n2\n")
    _, second, _ = attempts.begin(tmp_path, JOB, ["n1"], 3.0, "NODE_FAIL", progress)
    assert (second.cause, second.node) == ("node", "n2")
    assert attempts.read(tmp_path, JOB)[1] == second


def test_the_last_try_is_told_apart_in_the_log(tmp_path: Path) -> None:
    log = job_files.log_file(tmp_path, JOB, 0)
    first = "=== try 1 on n1, n2\nsrun: error: n1: task 0: Killed\n=== try 1 ended: boom\n"
    log.write_text(first)
    assert attempts.ending(tmp_path, JOB, 137) == Ending("crash", *_killed(0, "n1"))
    log.write_text(first + "=== try 2 on n1, n2\nsrun: error: n2: task 3: Killed\n=== try 2 ended")
    assert attempts.ending(tmp_path, JOB, 137) == Ending("crash", *_killed(3, "n2"))
    log.write_text(first + "=== try 2 on n1, n2\n")
    assert attempts.ending(tmp_path, JOB, 137).node == ""


def _killed(rank: int, node: str) -> tuple[str, str]:
    how = "killed (SIGKILL), perhaps for want of memory"
    return f"rank {rank} on {node}: {how}", node


@pytest.mark.parametrize(
    ("log", "why"),
    [
        ("srun: error: n1: task 3: Out Of Memory\n", "out of memory: killed (SIGKILL)"),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0. Some of your processes\n"
            "srun: error: n1: task 3: Killed\n",
            "out of memory: killed (SIGKILL)",
        ),
        ("srun: error: n1: task 3: Killed\n", "killed (SIGKILL), perhaps for want of memory"),
    ],
)
def test_out_of_memory_is_said_where_slurm_knows(tmp_path: Path, log: str, why: str) -> None:
    job_files.log_file(tmp_path, JOB, 0).write_text(f"=== try 1 on n1\n{log}")
    assert attempts.ending(tmp_path, JOB, 137) == Ending("crash", f"rank 3 on n1: {why}", "n1")
