"""Preparing through ranks: real jobs of real processes on this machine."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from cvae.data.store import store_path
from cvae.data.text_encoder import load_encoder
from cvae.errors import UserError
from cvae.preparation.image_decoding import ImageParts
from cvae.preparation.part_workers import PartPlan
from cvae.preparation.store_writer import locked
from slurm import executors, job_state
from slurm.cluster_file import Placement
from slurm.executors import Job
from slurm.job_state import Submission
from tests.conftest import PROJECT_ROOT
from tests.cvae.data.conftest import contents, small_bert, write_coco
from tests.helpers.local_place import HERE
from tests.helpers.waiting import until
from workflows.jobs import prepare_job
from workflows.jobs.prepare_job import end_leftover, filler
from workflows.prepare import main

__all__ = ["small_bert"]


def test_two_ranks_prepare_the_same_bytes(
    home: Path, small_bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_coco(home / "coco", {"val2017": 40})
    command = ["coco", "--root", str(root), "--split", "val2017", "--size", "16"]
    command += ["--text", small_bert]
    assert main(command) == 0
    path = store_path("coco", 16)
    alone = contents(path)
    shutil.rmtree(path)
    with pytest.raises(UserError, match="--gpus 3 is the total and does not divide over --nodes 2"):
        main([*command, "--nodes", "2", "--gpus", "3"])
    with pytest.raises(UserError, match="no such cluster"):
        main([*command, "--cluster", "nowhere"])
    assert not path.exists()
    assert main([*command, "--gpus", "2", "--cluster", "local"]) == 0
    assert "ranks  1 node × 2 = 2 ranks" in capsys.readouterr().out
    assert contents(path) == alone


@pytest.fixture
def plan(home: Path, small_bert: str, monkeypatch: pytest.MonkeyPatch) -> PartPlan:
    """Nine images of which none is decoded, to be filled by a function of tests.helpers.job_targets."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT_ROOT))
    folder = home / "data" / "coco-16" / ".preparing"
    parts = ImageParts.begin(folder / "val.images", home, ["x.jpg"] * 9, 16, False, {})
    return PartPlan(folder, [parts], [], load_encoder(small_bert))


def test_the_reason_of_a_rank_that_fails_is_told(
    plan: PartPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_job, "FILL", "tests.helpers.job_targets:refuse")
    with pytest.raises(UserError, match=r"left 1 of 1 parts undone: .*the rope is too short; fini"):
        filler(Placement(1, 1), "local")(plan)
    assert not (plan.folder / "job" / "submission.json").exists()
    (plan.images[0].folder / "00000.json").touch()
    filler(Placement(1, 1), "local")(plan)  # nothing to do: no job


def test_ctrl_c_cancels_the_job(plan: PartPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_job, "FILL", "tests.helpers.job_targets:wait")

    def press() -> None:
        until((plan.folder / "pid-0").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        filler(Placement(1, 1), "local")(plan)
    with pytest.raises(ProcessLookupError):
        os.kill(int((plan.folder / "pid-0").read_text()), 0)
    assert not (plan.folder / "job" / "submission.json").exists()


def test_a_job_that_a_killed_preparation_left_is_ended(
    plan: PartPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    store, logs = plan.folder.parent, plan.folder / "job"
    end_leftover(store)
    logs.mkdir()
    job = Job("test", logs, "tests.helpers.job_targets:wait", (plan.folder,), {})
    submission: Submission = executors.submit(job, HERE, Placement(1, 1), 1)
    (logs / "submission.json").write_text(submission.model_dump_json())
    until((plan.folder / "pid-0").exists)
    with locked(store), pytest.raises(UserError, match="is being prepared by another process"):
        end_leftover(store)
    assert job_state.look(submission).alive
    began = time.monotonic()
    end_leftover(store)
    assert not job_state.look(submission).alive
    assert time.monotonic() - began < 10
    assert "which an earlier preparation left" in capsys.readouterr().out
    end_leftover(store)
    assert capsys.readouterr().out == ""
