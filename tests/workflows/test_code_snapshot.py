"""A run is submitted, then somebody edits the checkout while it waits in the queue."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cvae.run import code_snapshot
from cvae.run.directory import RunDirectory
from slurm import job_state
from slurm.cluster_file import ClusterConfig, Placement
from slurm.executors import Job, sbatch_script
from tests.conftest import PROJECT_ROOT, tiny_experiment
from tests.helpers.ranks import lines
from tests.helpers.waiting import until
from workflows.jobs.run_state import run_state, submissions
from workflows.jobs.submission import job_environment

# In sitecustomize.py: the controller of a local job waits here as a job does in SLURM's queue.
QUEUE = """
import os, sys, time
while "slurm.local_jobs" in sys.orig_argv and not os.path.exists(os.environ["QUEUE_GATE"]):
    time.sleep(0.05)
"""
BUG = """
def evaluate_elbo(*arguments, **more):
    from cvae.errors import UserError
    raise UserError("the bug of the first version")
"""
SIGN = "print('code of', __file__, flush=True)\n"


def test_the_snapshot_comes_before_what_the_cluster_file_adds(tmp_path: Path) -> None:
    config = ClusterConfig(executor="slurm", env={"PYTHONPATH": "/site", "COLOUR": "blue"})
    env = job_environment(tmp_path)
    script = sbatch_script(Job("x", tmp_path, "a:b", (), env), config, Placement(1, 1))
    assert f"export PYTHONPATH={env['PYTHONPATH']}:/site\n" in script
    assert env["PYTHONPATH"].startswith(str(tmp_path))


def test_a_run_uses_the_code_of_its_submission_and_a_resumed_one_todays(
    tiny_store: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, gate = home / "checkout", home / "gate"
    for part in ("analysis", "cvae", "slurm", "workflows", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT_ROOT / part, checkout / part, ignore=ignored)
    for name in ("cvae/training/train.py", "cvae/tracking/mlflow_mirror.py", "slurm/local_jobs.py"):
        file = checkout / name
        first, main, last = file.read_text().partition("\nif __name__ ==")
        file.write_text(first + "\n" + SIGN + main + last)
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(QUEUE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(checkout), str(home / "site")]))
    monkeypatch.setenv("QUEUE_GATE", str(gate))

    def command(script: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, str(checkout / "workflows" / script), *words],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    experiment = home / "tiny.yaml"
    experiment.write_text(yaml.safe_dump(tiny_experiment(epochs=1)))
    elbo = checkout / "cvae/evaluation/elbo.py"
    fixed = elbo.read_text()
    elbo.write_text(fixed + BUG)
    here = ["--cluster", "local", "--gpus", "1", "--detach"]
    command("launch.py", str(experiment), "--name", "x", *here)

    # Three hours later the bug is gone, and half of the code does not even compile any more.
    run = RunDirectory(home / "runs" / "x")
    elbo.write_text(fixed)
    broken = {file: file.read_text() for file in (checkout / "cvae/training").glob("*.py")}
    for file in broken:
        file.write_text("def")
    gate.touch()
    until(lambda: not run_state(run).job.alive)
    state = run_state(run)
    assert (state.status, state.reason) == ("failed", "the bug of the first version")
    [id] = [entry["code"] for entry in run.submissions()]
    snapshot = code_snapshot.read(run.path / "code" / id)
    assert [start["code"] for start in lines(run, "start")] == [snapshot.source]
    logs = [run.logs / name for name in ("controller.out", "mlflow.log")]
    for log in [*logs, *run.logs.glob("*_0_log.out")]:
        assert f"code of {home}/code/{id}/" in log.read_text(), log

    for file, text in broken.items():
        file.write_text(text)
    gate.unlink()
    output = command("runs.py", "resume", "x", *here)
    last = submissions(run)[-1]
    job_state.end(last, 0, lambda _: None)
    assert last.code not in (None, id)
    assert last.folder == str(run.path.resolve())
    assert "the run began with" in output
    assert f"code/{id} runs/x/code/{last.code}\n" in output.replace(f"{home}/", "").replace(
        "../", ""
    )
    assert "the bug" not in (run.path / f"code/{last.code}/cvae/evaluation/elbo.py").read_text()
