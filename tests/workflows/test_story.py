"""The story of a run's tries, as `runs.py show` tells it."""

import json
from pathlib import Path

import pytest

from cvae.config import Experiment
from cvae.run_directory import RunDirectory
from cvae.training import journal
from slurm import files, tries
from slurm.client import JobState
from slurm.tries import Try
from tests.conftest import tiny_experiment
from workflows.story import story

ENTRY = {"time": 1.0, "cluster": "v100", "executor": "slurm", "job_id": "12", "host": "login"}
ENTRY |= {"nodes": 2, "gpus": 8, "world_size": 8}


@pytest.fixture
def run(home: Path) -> RunDirectory:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    run.launch_file.write_text(json.dumps([ENTRY]))
    lines = [(11, "start", 0), (20, "step", 40), (30, "step", 90), (51, "start", 80)]
    text = "".join(json.dumps({"time": t, "kind": k, "step": s}) + "\n" for t, k, s in lines)
    run.journal_file.write_text(text)
    nodes = [f"n{number}" for number in range(10)]
    crash = Try(1, 10.0, nodes, 31.0, "crash", "rank 3 on n1: Killed", "n1", "", True, ["n1"])
    tries.write(run.logs, "12", [crash, Try(2, 50.0, ["n2"])])
    return run


def told(run: RunDirectory, job: JobState) -> list[str]:
    return story(run, journal.read(run.journal_file)[0], job)


def test_where_how_far_why_and_what_was_lost(run: RunDirectory) -> None:
    first, second = told(run, JobState("running", "RUNNING"))
    assert "on n0, n1, n2, n3, n4, n5, n6, n7 and 2 more" in first
    for words in ("step 0 to 90", "after 21 s", "rank 3 on n1: Killed", "10 steps lost"):
        assert words in first
    assert first.endswith("next without n1")
    assert second.endswith("on n2; step 80 to 80; running")


def test_a_try_that_slurm_has_ended_for_good(run: RunDirectory) -> None:
    result = {"status": "stopped", "reason": "SIGTERM at step 99, saved"}
    files.result_file(run.logs, "12").write_text(json.dumps(result))
    last = told(run, JobState("ended", "CANCELLED"))[-1]
    assert last.endswith("cancelled in SLURM; SIGTERM at step 99, saved")
