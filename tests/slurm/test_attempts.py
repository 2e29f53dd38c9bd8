"""How an attempt ended, and whether another follows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from slurm import attempts
from slurm.attempts import Attempt, AttemptEnd, Cause, log_file
from slurm.failure_diagnosis import diagnose, first_failure
from slurm.supervision import AttemptLog, Supervision

JOB = "12"
SAVED = "at step 9, saved"


def crashed(number: int, progress: str, node: str = "", cause: Cause = Cause.CRASH) -> Attempt:
    return Attempt(number, 0.0, ["n1", "n2"], 1.0, AttemptEnd(cause, node), progress)


def write_result(folder: Path, status: str, *signals: str) -> None:
    text = json.dumps({"status": status, "reason": SAVED, "signals": signals})
    attempts.result_file(folder, JOB).write_text(text)


@pytest.mark.parametrize(
    ("result", "status", "preempted", "cause"),
    [
        (("finished",), 0, False, "finished"),
        (("failed",), 1, False, "failed"),
        (("stopped", "SIGUSR2"), 0, False, "time limit"),
        (("stopped", "SIGTERM", "SIGUSR2"), 0, False, "time limit"),
        (("stopped", "SIGTERM"), 0, True, "preempted"),
        # Somebody's own signal: SLURM knows of no preemption.
        (("stopped", "SIGTERM"), 0, False, "signal"),
        # Preempted while it was still importing.
        (None, 143, True, "preempted"),
        (None, 137, False, "crash"),
        (None, 255, False, "crash"),
    ],
)
def test_how_an_attempt_ended(
    tmp_path: Path, result: tuple[str, ...] | None, status: int, preempted: bool, cause: str
) -> None:
    if result is not None:
        write_result(tmp_path, *result)
    end = diagnose(tmp_path, JOB, status, preempted)
    assert end.cause == cause
    assert end.signals == (result[1:] if result else ("SIGKILL",) * (status == 137))
    assert end.reason


@pytest.mark.parametrize("cause", ["time limit", "preempted", "crash"])
def test_a_cancelled_job_is_never_revived(tmp_path: Path, cause: str) -> None:
    if cause != "crash":
        write_result(tmp_path, "stopped", "SIGUSR2")
    attempts.mark_cancelled(tmp_path, JOB)
    end = diagnose(tmp_path, JOB, 1, preempted=cause == "preempted")
    assert end.cause == "cancelled"
    assert not attempts.decide(end, "", [], 3).restarts


@pytest.mark.parametrize(("bad_input", "cause"), [(True, "bad input"), (False, "crash")])
def test_the_first_rank_to_fail_is_the_cause(tmp_path: Path, bad_input: bool, cause: str) -> None:
    reports = [
        (2.0, 1, "n2", "no such store", bad_input),
        (1.0, 0, "n1", "RuntimeError: gloo: Connection closed by peer", False),
    ]
    for when, rank, host, error, bad in reports:
        report = {"time": when, "rank": rank, "host": host, "error": error, "bad_input": bad}
        attempts.failure_file(tmp_path, JOB, rank).write_text(json.dumps(report))
    end = diagnose(tmp_path, JOB, 2)
    assert end == AttemptEnd(Cause(cause), "n2", 1, message="no such store")
    assert end.reason == "rank 1 on n2: no such store"
    assert attempts.decide(end, "", [], 3).restarts is not bad_input


def test_a_crash_is_repeated_only_while_it_brings_progress() -> None:
    crash = AttemptEnd(Cause.CRASH, exit_status=1)
    same = [crashed(number, "step-1") for number in (1, 2)]
    assert attempts.decide(crash, "step-1", same, 3).restarts
    end = attempts.decide(crash, "step-1", [*same, crashed(3, "step-1")], 3)
    assert (end.restarts, end.without_progress) == (False, 4)
    assert "4 attempts in a row brought no new checkpoint" in end.reason
    # After a new checkpoint the count begins anew.
    assert attempts.decide(crash, "step-2", [*same, crashed(3, "step-1")], 3).restarts
    # A preemption in between is no progress, nor is it the job's fault.
    preempted = crashed(3, "step-1", cause=Cause.PREEMPTED)
    assert attempts.decide(crash, "step-1", [*same, preempted], 3).restarts
    again = crashed(4, "step-1")
    assert not attempts.decide(crash, "step-1", [*same, preempted, again], 3).restarts
    assert attempts.decide(crash, "step-1", [], 0) == crash


@pytest.mark.parametrize("cause", ["finished", "failed", "bad input", "cancelled", "signal"])
def test_what_is_never_repeated(cause: str) -> None:
    assert not attempts.decide(AttemptEnd(Cause(cause)), "step-1", [], 3).restarts


def test_preemptions_and_failing_nodes_are_no_reason_to_give_up() -> None:
    earlier = [crashed(number, "", cause=Cause.PREEMPTED) for number in range(20)]
    assert attempts.decide(AttemptEnd(Cause.PREEMPTED), "", earlier, 3).restarts


def test_a_node_that_failed_twice_is_bad() -> None:
    nodes = [crashed(1, "a", "n1"), crashed(2, "b", "n2"), crashed(3, "c", "n2", Cause.NODE)]
    assert attempts.bad_nodes(nodes) == ["n2"]
    assert attempts.bad_nodes([crashed(n, "a", "n1", Cause.PREEMPTED) for n in range(3)]) == []


def test_an_attempt_that_slurm_ended_is_recorded_by_the_next(tmp_path: Path) -> None:
    log = AttemptLog(tmp_path, JOB, Supervision(str(tmp_path / "step-*")))
    log.begin(["n1", "n2"])
    write_result(tmp_path, "stopped", "SIGTERM")
    (tmp_path / "step-9").mkdir()
    log.settle("PREEMPTED")
    assert log.last.progress == "step-9"
    assert log.last.end == AttemptEnd(
        Cause.PREEMPTED, signals=("SIGTERM",), saved=True, message=SAVED, slurm_state="PREEMPTED",
        restarts=True,
    )  # fmt: skip
    assert log.last.end.reason == f"preempted in SLURM: {SAVED}"
    log.begin(["n1"])
    assert log.last.cause is None
    # What is left of the one is not taken for evidence of the other.
    assert diagnose(tmp_path, JOB, 1).cause == "crash"

    log_file(tmp_path, JOB, 0).write_text("slurmstepd: error: Node failure on n2\n")
    log.settle("NODE_FAIL")
    assert log.last.end is not None
    assert (log.last.end.cause, log.last.end.node) == ("node", "n2")
    assert attempts.read(tmp_path, JOB) == log.attempts


def test_the_last_attempt_is_told_apart_in_the_log(tmp_path: Path) -> None:
    log = log_file(tmp_path, JOB, 0)
    first = "=== try 1 on n1, n2\nsrun: error: n1: task 0: Killed\n=== try 1 ended: boom\n"
    log.write_text(first)
    assert diagnose(tmp_path, JOB, 137) == AttemptEnd(Cause.CRASH, "n1", 0, ("SIGKILL",))
    log.write_text(first + "=== try 2 on n1, n2\nsrun: error: n2: task 3: Killed\n=== try 2 ended")
    assert diagnose(tmp_path, JOB, 137) == AttemptEnd(Cause.CRASH, "n2", 3, ("SIGKILL",))
    log.write_text(first + "=== try 2 on n1, n2\n")
    assert diagnose(tmp_path, JOB, 137).node == ""


@pytest.mark.parametrize(
    ("log", "how"),
    [
        ("srun: error: n1: task 3: Out Of Memory\n", "out of memory: killed (SIGKILL)"),
        (
            "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0. Some of your processes\n"
            "srun: error: n1: task 3: Killed\n",
            "out of memory: killed (SIGKILL)",
        ),
        ("srun: error: n1: task 3: Killed\n", "killed (SIGKILL), perhaps because memory ran out"),
        (
            "srun: error: n1: task 3: Segmentation fault (core dumped)\n",
            "Segmentation fault (SIGSEGV)",
        ),
        ("srun: error: n1: task 3: Exited with exit code 7\n", "exited with status 7"),
        ("srun: error: n1: task 3: Ate a bad byte\n", "Ate a bad byte"),
    ],
)
def test_how_a_rank_ended_in_words(tmp_path: Path, log: str, how: str) -> None:
    log_file(tmp_path, JOB, 0).write_text(f"=== try 1 on n1\n{log}")
    end = diagnose(tmp_path, JOB, 137)
    assert (end.cause, end.reason) == ("crash", f"rank 3 on n1: {how}")
    assert end.out_of_memory == how.startswith("out of memory")


def test_the_words_of_an_older_local_controller_are_read(tmp_path: Path) -> None:
    log = tmp_path / "controller.out"
    log.write_text(f"=== try 1 on n1\njob {JOB}: task 1: Killed\njob 13: task 0: Killed\n")
    assert diagnose(tmp_path, JOB, -9) == AttemptEnd(Cause.CRASH, rank=1, signals=("SIGKILL",))


SETUP = "the line 'module load cuda/99' failed with status 1"


@pytest.mark.parametrize(
    "earlier", ["", "=== try 1 on n1\nboom\n=== try 1 ended: boom; it restarts\n"]
)
def test_a_failed_line_of_setup_is_the_cause(tmp_path: Path, earlier: str) -> None:
    log = log_file(tmp_path, JOB, 0)
    log.write_text(
        f"{earlier}module: command not found\nerror: setup in the cluster file: {SETUP}\n"
    )
    failure = first_failure(tmp_path, JOB)
    assert failure is not None
    assert failure.end == AttemptEnd(Cause.SETUP, message=SETUP)
    assert str(failure) == f"setup in the cluster file: {SETUP}"
    assert (failure.log, failure.tail[-2]) == (log, "module: command not found")
    # In a later attempt setup passed.
    log.write_text(log.read_text() + "=== try 2 on n1\n")
    assert first_failure(tmp_path, JOB) is None


def test_files_of_older_commits_are_read(tmp_path: Path) -> None:
    """Then an attempt had a sentence and a few fields, and no end of its own."""
    old = {
        "number": 1, "began": 1.0, "nodes": ["n1"], "ended": 5.0, "cause": "crash",
        "why": "rank 0 on n1: boom", "node": "n1", "progress": "step-1", "restarts": True,
        "excluded": ["n1"], "requeue": "asked", "refusal": "",
    }  # fmt: skip
    running = {**old, "number": 2, "ended": None, "cause": None, "why": "", "restarts": False}
    attempts.attempts_file(tmp_path, JOB).write_text(json.dumps([old, running]))
    first, second = attempts.read(tmp_path, JOB)
    assert first.end == AttemptEnd(
        Cause.CRASH,
        "n1",
        restarts=True,
        requeue="asked",
        excluded=("n1",),
        text="rank 0 on n1: boom",
    )
    assert first.end.reason == "rank 0 on n1: boom"
    assert second == Attempt(2, 1.0, ["n1"], progress="step-1")
    attempts.write(tmp_path, JOB, [first, second])
    assert attempts.read(tmp_path, JOB) == [first, second]
    assert attempts.answered(first, "").end == replace(first.end, requeue="accepted")
