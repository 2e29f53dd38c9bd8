"""Parts of a trial without Ray: its values, the names of its runs, and forks."""

import os
from pathlib import Path

import pytest

from cvae.config.experiment import Experiment
from cvae.run import checkpoint
from tests.conftest import tiny_experiment
from tests.helpers.trained_runs import make_run
from workflows.sweeps import driver
from workflows.sweeps.directory import (
    LISTED,
    SweepDirectory,
    Trial,
    best_trial,
    run_name,
    values_of,
)
from workflows.sweeps.sweep_file import Sweep
from workflows.sweeps.trial import fork


def test_values_and_names_of_a_trial() -> None:
    values = values_of({LISTED: {"seed": 2, "model.fusion": "add"}, "optimizer.lr": 3e-4})
    assert values == {"model.fusion": "add", "seed": 2, "optimizer.lr": 3e-4}
    assert run_name("s", 7, values) == "s-07-fusion_add-seed_2-lr_0.0003"
    assert run_name("s", 7, {"optimizer.betas": [0.9, 0.99]}) == "s-07-betas__0.9__0.99"
    assert len(run_name("s", 7, {f"a{n}": "long" for n in range(50)})) <= 90


def test_the_best_trial_is_never_a_failed_one() -> None:
    bests = [3.0, 1.0, None, 2.0]
    trials = [Trial(n, str(n), str(n), {}, best=best) for n, best in enumerate(bests)]
    trials[1].status = "failed"
    assert best_trial(trials, "min") is trials[3]
    assert best_trial(trials, "max") is trials[0]
    assert best_trial([], "min") is None


@pytest.mark.usefixtures("tiny_store")
def test_a_fork_begins_from_another_runs_weights_and_is_created_once(home: Path) -> None:
    origin = make_run("origin")
    faster = origin.experiment().model_copy(update={"seed": 5})
    run = fork(origin, 7, "trial", faster)
    assert run.experiment() == faster
    (mine, step), (theirs, _) = (
        checkpoint.load_weights(one.checkpoints, print) for one in (run, origin)
    )
    assert step == 7
    assert all((mine[name] == weight).all() for name, weight in theirs.items())
    assert fork(origin, 7, "trial", faster).path == run.path
    # It was killed while it copied the checkpoint: the next attempt copies it again.
    (run.checkpoints / "step-00000007").rename(run.checkpoints / ".step-00000007.new")
    assert fork(origin, 7, "trial", faster).path == run.path
    assert checkpoint.load_weights(run.checkpoints, print)[1] == 7
    other = faster.model_copy(update={"seed": 6})
    assert fork(origin, 7, "trial", other).path != run.path
    # The requested step was removed: the fork begins from the newest one.
    assert checkpoint.steps(fork(origin, 3, "late", other).checkpoints) == checkpoint.steps(
        origin.checkpoints
    )


def test_a_state_of_ray_tune_that_older_code_pickled_is_begun_anew(
    tiny_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"name": "s", "experiment": "tiny.yaml", "space": {"seed": {"grid": [1, 2]}}}
    experiment = Experiment.model_validate(tiny_experiment())
    sweep = SweepDirectory.create("s", Sweep.model_validate(keys), experiment)
    sweep.ray.mkdir()
    (sweep.ray / "experiment_state-1.json").write_text('{"trial_id": "a"}')
    (sweep.ray / "tuner.pkl").write_bytes(b"cworkflows.sweeps.book\nBook\n.")
    monkeypatch.setattr("ray.tune.with_parameters", lambda run, **parameters: run)
    assert driver.make_tuner(sweep, 1, 1.0) is not None
    assert "No module named 'workflows.sweeps.book'" in caplog.text
    assert not list(sweep.ray.glob("experiment_state-*"))


@pytest.mark.parametrize("started", [False, True])
def test_a_sweep_whose_trials_do_not_start_gives_up_with_rays_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    sweep = SweepDirectory(tmp_path)
    sweep.write_trials([Trial(0, "a", "r", {}, status="running" if started else "queued")])
    (tmp_path / "raylet.err").write_text("bash: line 1: /a/my: No such file or directory\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(driver, "_NOTICE_S", 0.01)
    monkeypatch.setattr(driver, "_START_PATIENCE_S", 0.02)
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    driver._watch_start(sweep)
    assert ends == [1] * (not started)
    if not started:
        problem = (tmp_path / "problem.txt").read_text()
        assert problem.startswith(
            "no trial has started for 0 s; Ray's log: bash: line 1: /a/my: No"
        )
