"""How journal and queue together make a run's status."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from cvae.config.experiment import Experiment
from cvae.data.experiment_data import open_data
from cvae.errors import UserError
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line
from slurm import job_state, local_jobs
from slurm.commands import JobState
from slurm.job_state import Submission
from tests.conftest import tiny_experiment
from workflows import runs
from workflows.jobs.follow import Follower
from workflows.jobs.run_state import RunState, judge, run_state, total_steps_of
from workflows.sweeps.directory import SweepDirectory
from workflows.terminal.live_display import Display

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


def test_the_total_of_steps_honours_the_share_of_the_data(tiny_store: Path) -> None:
    experiment = Experiment.model_validate(tiny_experiment())
    half = experiment.model_copy(
        update={"data": experiment.data.model_copy(update={"fraction": 0.5})}
    )
    for one in (experiment, half):
        rows = open_data(one).train_rows
        assert total_steps_of(one) == one.total_steps(len(rows))
    assert total_steps_of(half) != total_steps_of(experiment)
    (tiny_store / "manifest.json").write_text('{"splits": []}')
    assert total_steps_of(half) is None


def test_a_copy_of_a_run_that_is_running_does_not_claim_its_job(home: Path) -> None:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as job:
        started = local_jobs.started_at(job.pid)
        here = {"machine": job_state.this_machine(), "process_started": started, "host": "vm"}
        entry = {"time": 1, "cluster": "local", "executor": "local", "job_id": str(job.pid)}
        more = {"nodes": 1, "gpus": 1, "world_size": 1, "folder": str(run.path)}
        run.launch_file.write_text(json.dumps([{**entry, **here, **more}]))
        shutil.copytree(run.path, run.path.with_name("copy"))
        run.path.with_name("link").symlink_to(run.path)
        folders = [run.path.with_name(name) for name in ("r", "copy", "link")]
        alive = [run_state(RunDirectory(folder)).job.alive for folder in folders]
        assert alive == [True, False, True]
        sweeps = [SweepDirectory(folder).submissions()[-1] for folder in folders]
        assert [job_state.look(one).alive for one in sweeps] == alive
        with pytest.raises(UserError, match="there is nothing to cancel"):
            runs.main(["cancel", "copy"])
        assert run_state(RunDirectory(run.path.rename(run.path.with_name("moved")))).job.alive
        job.kill()
    queued = {**entry, **here, **more, "executor": "slurm", "copied": True}
    assert job_state.look_at_all([Submission.model_validate(queued)])[0].phase == "ended"


def test_a_job_that_starts_here_names_its_host_once(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    entry = {"time": 1, "cluster": "local", "executor": "local", "job_id": "7", "host": "vm"}
    run.launch_file.write_text(json.dumps([{**entry, "nodes": 1, "gpus": 1, "world_size": 1}]))
    follower = Follower(run, Display())
    follower.job = JobState("running", "RUNNING", "vm")
    follower.show_waiting(RunState("starting", "", follower.job))
    assert capsys.readouterr().out == "starting: process 7 on vm\n"


def test_what_goes_on_before_the_second_point_is_shown(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_experiment(log_every=50, compile=True)
    run = RunDirectory.create("r", Experiment.model_validate(tree))
    entry = {"time": 1, "cluster": "local", "executor": "local", "job_id": "7", "host": "vm"}
    run.launch_file.write_text(json.dumps([{**entry, "nodes": 1, "gpus": 1, "world_size": 1}]))
    follower = Follower(run, Display())
    follower.job = JobState("running", "RUNNING", "vm")
    follower.show_line({"kind": "preflight"})
    follower.show_waiting(RunState("starting", "", follower.job))
    follower.show_line({"kind": "start", "step": 0, "world_size": 1})
    follower.show_waiting(RunState("running", "", follower.job))
    for step in (1, 50):
        follower.display._printed_at = 0.0
        follower.show_line({"kind": "step", "step": step, "metrics": {}})
    assert capsys.readouterr().out.splitlines() == [
        "starting: process 7 on vm; the nodes are checked, the model is being built",
        "training from step 0 on 1 rank ()",
        "waiting for the first step; the model is being compiled",
        "step 1 of ?  next point step 50",
        "step 50 of ?",
    ]
