"""The attempts of a run, as `runs.py show` lists them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cvae.config.experiment import Experiment
from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import attempts
from slurm.attempts import Attempt, AttemptEnd, Cause
from slurm.commands import JobState
from tests.conftest import tiny_experiment
from workflows.listing.attempt_summary import attempt_lines
from workflows.listing.run_view import show_text

ENTRY = {"time": 1.0, "cluster": "v100", "executor": "slurm", "job_id": "12", "host": "login"}
ENTRY |= {"nodes": 2, "gpus": 8, "world_size": 8}


@pytest.fixture
def run(home: Path) -> RunDirectory:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    run.launch_file.write_text(json.dumps([ENTRY]))
    lines = [(11, "start", 0), (20, "step", 40), (30, "step", 90), (51, "start", 80)]
    text = "".join(
        json.dumps({"time": t, "kind": k, "step": s, "metrics": {}}) + "\n" for t, k, s in lines
    )
    run.journal_file.write_text(text)
    nodes = [f"n{number}" for number in range(10)]
    crash = AttemptEnd(
        Cause.CRASH, "n1", rank=3, signals=("SIGKILL",), restarts=True, excluded=("n1",)
    )
    first = Attempt(1, 10.0, nodes, 31.0, crash)
    attempts.write(run.logs, "12", [first, Attempt(2, 50.0, ["n2"])])
    return run


def summary(run: RunDirectory, job: JobState) -> list[str]:
    return attempt_lines(run, journal.read(run.journal_file)[0], job)


def test_where_how_far_why_and_what_was_lost(run: RunDirectory) -> None:
    first, second = summary(run, JobState("running", "RUNNING"))
    assert "on n0, n1, n2, n3, n4, n5, n6, n7 and 2 more" in first
    for words in ("step 0 to 90", "after 21 s", "rank 3 on n1: killed (SIGKILL)", "10 steps lost"):
        assert words in first
    assert first.endswith("next without n1")
    assert second.endswith("on n2; step 80 to 80; running")


def test_an_attempt_that_slurm_has_ended_for_good(run: RunDirectory) -> None:
    result = {"status": "stopped", "reason": "SIGTERM at step 99, saved"}
    attempts.result_file(run.logs, "12").write_text(json.dumps(result))
    last = summary(run, JobState("ended", "CANCELLED"))[-1]
    assert last.endswith("cancelled in SLURM: SIGTERM at step 99, saved")


def test_a_requeue_that_slurm_refused_or_never_answered(run: RunDirectory) -> None:
    first, second = attempts.read(run.logs, "12")
    crash = AttemptEnd(Cause.CRASH, message="boom", restarts=True, requeue="asked")
    second = replace(second, ended=60.0, end=crash)
    attempts.write(run.logs, "12", [first, second])
    assert summary(run, JobState("queued", "PENDING"))[-1].endswith("; boom")
    last = summary(run, JobState("ended", "FAILED"))[-1]
    assert "it should have restarted, but SLURM was asked to requeue it and has not" in last
    attempts.write(run.logs, "12", [first, attempts.answered(second, "SLURM says: disabled")])
    last = summary(run, JobState("ended", "FAILED"))[-1]
    assert last.endswith(
        "boom; it should have restarted, but SLURM says: disabled; resume it by hand"
    )


def test_what_the_last_preflight_saw(run: RunDirectory) -> None:
    host = {"free_disk": 9e10, "free_memory": 31e9, "clock_offset_s": 0.0}
    other = {"free_disk": None, "free_memory": 29e9, "clock_offset_s": -0.42}
    network = {"latency_s": 2e-4, "bytes": 10**8, "seconds": 0.02}
    line = {"time": 51.0, "kind": "preflight", "hosts": {"n1": host, "n2": other}, "warnings": []}
    with run.journal_file.open("w") as file:
        for seconds, measured in ((7.0, None), (1.2, network)):
            file.write(json.dumps({**line, "seconds": seconds, "all_reduce": measured}) + "\n")
    text = show_text(run)
    assert "2 nodes in 1.2 s, free memory 29.0 GB, free disk 90.0 GB, clocks within 0.4 s" in text
    assert "all-reduce: 0.20 ms for 8 bytes, 0.020 s for 100 MB: 5 GB/s" in text
    assert "7.0 s" not in text
