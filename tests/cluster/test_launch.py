"""Launching on a real SLURM of two hosts: the queue, the ranks, the end of a rank, and one curve."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cvae.errors import UserError
from cvae.preparation.fashion_mnist import DEBIAN_FOLDER, prepare_fashion_mnist
from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import cluster_file as clusters
from slurm import executors, job_state
from slurm.attempts import AttemptEnd, Cause
from slurm.cluster_file import ClusterConfig, Place, Placement
from slurm.executors import Job
from slurm.failure_diagnosis import first_failure
from slurm.job_state import Submission
from tests.conftest import PROJECT_ROOT, tiny_experiment
from tests.helpers.waiting import until
from tests.testcluster import Cluster
from workflows import launch, runs

pytestmark = pytest.mark.cluster
STEPS, PART = 200, 150
# With a password, so that no script may contain it.
URI = "http://me:secret@cvae-host:9"


def start(*words: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "workflows/launch.py", *words],
        cwd=PROJECT_ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def end(process: "subprocess.Popen[str]") -> str:
    out = process.communicate(timeout=240)[0]
    assert process.returncode == 0, out
    return out


@pytest.fixture
def place(cluster: Cluster) -> Place:
    config = clusters.load("testcluster").model_copy(update={"cpus_per_gpu": 2})
    return Place("testcluster", config, "requested")


def submit(function: str, folder: Path, place: Place) -> Submission:
    target = f"tests.helpers.job_targets:{function}"
    env = {"PYTHONPATH": str(PROJECT_ROOT), "MLFLOW_TRACKING_URI": URI}
    job = Job("test", folder, target, (folder,), env)
    return executors.submit(job, place, Placement(2, 2), gpus=4)


def test_ranks_are_told_their_place(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if a person's settings have jobs, and their steps, begin without the shell's environment."""
    for name in ("SBATCH_EXPORT", "SLURM_EXPORT_ENV"):
        monkeypatch.setenv(name, "NONE")
    submission = submit("report", tmp_path, place)
    until(lambda: not job_state.look(submission).alive)
    facts_of_ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert [facts["RANK"] for facts in facts_of_ranks] == ["0", "1", "2", "3"]
    assert [facts["LOCAL_RANK"] for facts in facts_of_ranks] == ["0", "1", "0", "1"]
    for facts in facts_of_ranks:
        assert (facts["WORLD_SIZE"], facts["LOCAL_WORLD_SIZE"]) == ("4", "2")
        assert facts["MASTER_ADDR"] == "cvae-node1"
        assert facts["cpus"] == "2"
        assert facts["MLFLOW_TRACKING_URI"] == URI
        # All of its node's GPUs, not just the one of its local rank.
        assert len(facts["CUDA_VISIBLE_DEVICES"].split(",")) == 2
    assert len({facts["MASTER_PORT"] for facts in facts_of_ranks}) == 1
    assert job_state.look(submission).slurm_state == "COMPLETED"


def test_a_dead_rank_ends_the_job_and_is_named(place: Place, tmp_path: Path) -> None:
    submission = submit("last_dies", tmp_path, place)
    until(lambda: not job_state.look(submission).alive, seconds=60)
    failure = first_failure(tmp_path, submission.job_id)
    assert failure is not None
    assert failure.end == AttemptEnd(Cause.CRASH, "cvae-node2", 3, ("SIGKILL",))
    assert job_state.look(submission).slurm_state == "FAILED"


def test_a_queued_run_tells_why_it_waits_and_can_be_cancelled(
    cluster: Cluster, tiny_store: Path, home: Path
) -> None:
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_experiment()))
    wide = ["--partition=main", "--nodes=2", "--gpus-per-node=4", "--time=10"]
    blocker = cluster.command(
        "sbatch", "--parsable", *wide, "--output=/dev/null", "--wrap=sleep 300"
    )
    try:
        process = start(str(file), "--cluster", "testcluster", "--name", "q")
        assert process.stdout is not None
        seen = ""
        while "waits for: " not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        with pytest.raises(UserError, match=r"q is queued \(job"):
            runs.main(["resume", "q"])
        assert runs.main(["cancel", "q"]) == 0
        out = seen + process.communicate(timeout=60)[0]
    finally:
        cluster.command("scancel", blocker.strip())
    assert "cancelled  q at step 0" in out
    assert "before it began" in out
    assert process.returncode == 3


def test_what_slurm_says_is_asked_before_anything_is_written(
    on_cluster: Cluster, tiny_store: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_experiment()))
    for words, message in [
        (["--nodes", "2", "--gpus", "10"], "testcluster, partition main has 4 on a node"),
        (["--nodes", "3"], "testcluster, partition main has 2 nodes"),
    ]:
        with pytest.raises(UserError, match=message):
            launch.main([str(file), "--cluster", "testcluster", *words])
    with pytest.raises(UserError, match=r"partition 'gpu'; there are .*main"):
        clusters.fit(
            Place("site", ClusterConfig(executor="slurm", partition="gpu"), ""), Placement(1, 1)
        )
    # Without --cluster: SLURM, as it answers.
    assert launch.main([str(file), "--nodes", "2", "--gpus", "8", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "cluster slurm (a SLURM controller responds)" in out
    assert "SLURM would accept the job now" in out
    assert "#SBATCH --nodes=2" in out
    assert not (home / "runs").exists()


@pytest.mark.usefixtures("names_at_loopback")
def test_preflight_of_two_nodes(
    cluster: Cluster, tiny_store: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_experiment()))
    words = ["--preflight", "--nodes", "2", "--gpus", "2", "--cluster", "testcluster"]
    assert launch.main([str(file), *words]) == 0
    out = capsys.readouterr().out
    assert "needs  those of tiny" in out
    rows = [line.split()[:3] for line in out.splitlines() if line.startswith("cvae-node")]
    assert rows == [["cvae-node1", "1", "CPU"], ["cvae-node2", "1", "CPU"]]
    assert "all-reduce over 2 ranks: " in out
    assert "\npassed; the checks took " in out
    assert list((home / "runs").iterdir()) == []


@pytest.mark.timeout(600)  # 3 jobs of 4 ranks, each of which imports torch, on however few cores
def test_one_curve_and_bit_identical_after_scancel_and_resume(cluster: Cluster, home: Path) -> None:
    """Four ranks on two hosts follow the one-rank curve, and lose nothing when they are cancelled.

    With a tenth of the published learning rate: at the published one, a unit whose input is within 1e-7 of
    ReLU's kink in some of the 20 million cases falls on the other side of it, and Adam makes that a
    deviation of up to 5e-4 within some 50 steps, with some seeds, also on one rank with accumulation.
    """
    if not DEBIAN_FOLDER.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    prepare_fashion_mnist(DEBIAN_FOLDER)
    common = ("configs/fashion_mnist.yaml", "optimizer.lr=1e-4", "training.log_every=1")
    common = (*common, f"training.max_steps={STEPS}", f"checkpoint.every_steps={PART}")
    four = (*common, "--cluster", "testcluster", "--nodes", "2", "--gpus", "4")

    one_rank = start(*common, "--cluster", "local", "--name", "one")
    whole = start(*four, "--name", "whole")
    end(one_rank)
    assert "finished  whole" in end(whole)
    one, many = losses("one"), losses("whole")
    assert list(one) == list(many) == list(range(1, STEPS + 1))
    assert max(abs(many[step] - one[step]) / one[step] for step in one) < 1e-4
    hosts = next(line for line in lines("whole") if line["kind"] == "start")["hosts"]
    assert hosts == ["cvae-node1"] * 2 + ["cvae-node2"] * 2

    # The first part of the same run, in two pieces: nothing in it depends on where the run will end.
    end(start(*four, f"training.max_steps={PART}", "--name", "cut", "--detach"))
    until(lambda: max(losses("cut"), default=0) >= 5)
    cluster.command("scancel", RunDirectory(home / "runs" / "cut").submissions()[-1]["job_id"])
    until(lambda: lines("cut")[-1]["kind"] == "end")
    stopped = lines("cut")[-1]
    assert (stopped["status"], stopped["step"] < PART) == ("stopped", True)
    until(lambda: _resumed("cut"))
    assert losses("cut") == {step: many[step] for step in range(1, PART + 1)}
    assert checkpoint("cut", PART) == checkpoint("whole", PART) != checkpoint("whole", STEPS)


def _resumed(name: str) -> bool:
    """Resumes and follows to the end; False while SLURM still cleans up after the cancelled job."""
    try:
        return runs.main(["resume", name]) == 0
    except UserError:
        return False


def lines(name: str) -> list[dict]:  # type: ignore[type-arg]
    run = RunDirectory.open(name)
    return journal.read(run.journal_file)[0]


def losses(name: str) -> dict[int, float]:
    return {x["step"]: x["metrics"]["train/loss"] for x in lines(name) if x["kind"] == "step"}


def checkpoint(name: str, step: int) -> dict[str, bytes]:
    folder = RunDirectory.open(name).checkpoints / f"step-{step:08d}"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
