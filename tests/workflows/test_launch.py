"""launch.py and runs.py as a person uses them: real runs on this machine, and every mistake one line."""

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.run import journal
from cvae.run.directory import RunDirectory
from slurm import attempts
from slurm.attempts import log_file
from tests.conftest import PROJECT_ROOT, tiny_experiment
from tests.helpers import ranks
from workflows import launch, runs
from workflows.jobs.run_state import last_submission
from workflows.jobs.submission import locked, training_environment

STEPS = 2000


@pytest.fixture
def tiny(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns an experiment file on a prepared store, on a machine where no SLURM controller responds."""
    home = tiny_store.parent.parent
    _silence_slurm(home, monkeypatch)
    file = home / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_experiment(epochs=400, eval_every=100, log_every=20)))
    return str(file)


def _silence_slurm(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = home / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")


def everything(folder: Path) -> dict[str, float]:
    """Returns the modification times of all files except the records of verified stores."""
    files = [file for file in sorted(folder.rglob("*")) if ".verified" not in file.parts]
    return {str(file): file.stat().st_mtime for file in files}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EXPERIMENT", "--gpus", "7", "--nodes", "2"], "does not divide over --nodes 2"),
        (["EXPERIMENT", "--gpus", "0"], "0 is not a whole number above 0"),
        (["EXPERIMENT", "--gpu", "2"], "unrecognized arguments: --gpu"),
        (["EXPERIMENT", "EXPERIMENT"], "one experiment at a time"),
        (["EXPERIMENT", "--cluster", "v10"], "there are local, slurm"),
        (["EXPERIMENT", "--cluster", "v100"], "cluster v100: SLURM does not answer"),
        (["EXPERIMENT", "model.latent_dimm=3"], "did you mean model.latent_dim?"),
        (["EXPERIMENT", "model.latent_dim=three"], "model.latent_dim = 'three'"),
        (["EXPERIMENT", "data.image_size=32"], "is not prepared at 32×32"),
        (["EXPERIMENT", "training.precision=fp16"], "needs a GPU"),
        (["EXPERIMENT", "training.global_batch_size=1", "--gpus", "2"], "without an image"),
        (["EXPERIMENT", "--name", "a/b"], "a run's name is"),
        (["EXPERIMENT", "--name", "taken"], "run name taken is taken"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tiny: str, home: Path, arguments: list[str], message: str
) -> None:
    RunDirectory.create("taken", Experiment.model_validate(tiny_experiment()))
    before = everything(home)
    with pytest.raises(UserError) as caught:
        launch.main([tiny if word == "EXPERIMENT" else word for word in arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(home) == before


def test_a_folder_that_cannot_be_written_is_one_line(tiny: str, home: Path) -> None:
    (home / "runs").symlink_to("/sys")  # not even root can write there
    with pytest.raises(UserError, match="cannot be written"):
        launch.main([tiny, "--name", "x"])


def test_a_dry_run_prints_everything_and_writes_nothing(
    tiny: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(home)
    words = [tiny, "--gpus", "4096", "--dry-run", "training.micro_batch_size=3", "--name", "dry"]
    assert launch.main([*words[:1], "training.global_batch_size=4096", *words[1:]]) == 0
    plan = capsys.readouterr().out
    assert "4,096 ranks requested, " in plan
    assert "4,096 images" in plan
    assert "× at most 3" in plan
    assert "train 50, val 21" in plan

    assert (
        launch.main([*words[:1], "--cluster", "v100", "--nodes", "2", "--gpus", "8", "--dry-run"])
        == 0
    )
    plan = capsys.readouterr().out
    assert "2 nodes × 4 = 8 ranks" in plan
    assert "10 images: 1 or 2 per rank" in plan
    assert "#SBATCH --gpus-per-node=v100:4" in plan
    assert everything(home) == before


def test_the_plan_names_the_engine(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [tiny, "--engine", "deepspeed", "training.deepspeed.zero_stage=3", "--dry-run"]
    assert launch.main(words) == 0
    plan = capsys.readouterr().out
    assert "training.engine=deepspeed" in plan
    assert "DeepSpeed, ZeRO stage 3" in plan


def test_without_an_experiment_the_first_line_says_which_and_why(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _silence_slurm(home, monkeypatch)
    with pytest.raises(UserError) as caught:
        launch.main(["--nodes", "2", "--gpus", "8"])
    assert "prepare.py scenes" in caught.value.with_hint()
    assert "demo.yaml: " in capsys.readouterr().out


def test_a_run_that_fails_says_why(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([tiny, "--name", "bad", "optimizer.lr=1e38", "training.epochs=2"]) == 1
    out = capsys.readouterr().out
    assert "not finite at step" in out
    assert "Traceback" not in out
    with pytest.raises(UserError, match="nothing to cancel"):
        runs.main(["cancel", "bad"])


def test_bad_input_that_only_the_job_can_find_is_reported_once_and_not_retried(
    tiny: str, tiny_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ranks.new_run("moved", tiny_experiment(max_steps=5))
    with closing(journal.Journal(run.journal_file)) as begun:
        begun.append("start", step=0, data_digest="0" * 64)
    assert runs.main(["resume", "moved", "--cluster", "local"]) == 2
    out = capsys.readouterr().out
    assert out.count("failed at step 0: moved was trained on other data") == 1
    [end] = ranks.lines(run, "end")
    assert (end["status"], end["reason"].count("was trained on other data")) == ("failed", 1)
    submission = last_submission(run)
    assert submission is not None
    [one] = attempts.read(run.logs, submission.job_id)
    assert (one.cause, one.restarts) == ("bad input", False)
    assert "Traceback" not in log_file(run.logs, submission.job_id, 0).read_text()


def test_one_launch_at_a_time(home: Path, tiny: str) -> None:
    run = RunDirectory.create("one", Experiment.model_validate(tiny_experiment()))
    with locked(run.path), pytest.raises(UserError, match="by another process right now"):
        runs.main(["resume", "one", "--gpus", "1", "--cluster", "local", "--detach"])


def test_detached_cancelled_resumed_and_finished(
    tiny: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(home / "runs" / "x")
    status, seen = _launch_and_press_ctrl_c(tiny, "--nodes", "2", "--gpus", "2", "--name", "x")
    assert status == 130
    assert "runs.py logs x --follow" in seen

    # The run goes on, and nobody can start it a second time.
    with pytest.raises(UserError, match="x is running"):
        runs.main(["resume", "x"])
    with pytest.raises(UserError, match="run name x is taken"):
        launch.main([tiny, "--name", "x"])
    assert runs.main(["cancel", "x"]) == 0
    assert "stopped  x: SIGTERM at step" in capsys.readouterr().out

    # Of two at once one is refused. Their output is a pipe: it must not stay open as long as the run.
    words = [sys.executable, "workflows/runs.py", "resume", "x", "--gpus", "1", "--detach"]
    twice = [
        subprocess.Popen(
            words, cwd=PROJECT_ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in twice]
    assert sorted(process.returncode for process in twice) == [0, 2], outputs

    assert runs.main(["logs", "latest", "--follow"]) == 0
    out = capsys.readouterr().out
    assert f"finished  x at step {STEPS:,} of {STEPS:,}" in out
    assert "val loss" in out
    lines = journal.read(run.journal_file)[0]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [
        1,
        *range(20, STEPS + 1, 20),
    ]
    assert [line["world_size"] for line in lines if line["kind"] == "start"] == [2, 1]

    with pytest.raises(UserError, match="x is finished"):
        runs.main(["resume", "x"])
    with pytest.raises(UserError, match="ranks 0 to 0"):
        runs.main(["logs", "x", "--rank", "1"])
    for words, expected in [
        (["list"], "finished"),
        (["show", "x"], "cancelled"),
        (["logs", "x"], "training from step"),
        (["path", "x"], str(run.path)),
    ]:
        assert runs.main(words) == 0
        assert expected in capsys.readouterr().out


def _launch_and_press_ctrl_c(*words: str) -> tuple[int, str]:
    """Returns the exit status and output of a launch on a terminal; Ctrl-C is pressed during the first steps."""
    terminal, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "workflows/launch.py", *words],
        cwd=PROJECT_ROOT,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(inner)
    os.set_blocking(terminal, False)
    seen, pressed, deadline = "", False, time.monotonic() + 120
    while process.poll() is None:
        assert time.monotonic() < deadline, seen
        time.sleep(0.05)
        seen += _read(terminal)
        # The bar, not just the start: it must be cleared away too.
        if not pressed and "step/s" in seen:
            os.write(terminal, b"\x03")
            pressed = True
    seen += _read(terminal)
    os.close(terminal)
    return process.returncode, seen


def _read(terminal: int) -> str:
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except (BlockingIOError, OSError):
        return ""


def test_submissions_are_written_down(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What other tools read of launch.json is accepted, with fields of later versions."""
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    entry = {
        "time": 1.0,
        "cluster": "v100",
        "executor": "slurm",
        "job_id": "12",
        "host": "login",
        "nodes": 2,
        "gpus": 8,
        "world_size": 8,
        "added by a later version": 1,
    }
    run.launch_file.write_text(json.dumps([entry]))
    assert runs.main(["cancel", "r"]) == 1
    assert "whether job 12 on v100 has ended is not known: " in capsys.readouterr().out


def test_a_training_keeps_its_memory_unless_the_user_decides_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(name, raising=False)
    code = "import os\nfor _ in range(20): bytearray(50 << 20)\n"
    code += "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    command = [sys.executable, "-c", code]
    plain, kept = (
        int(subprocess.check_output(command, env=os.environ | more))
        for more in ({}, training_environment())
    )
    assert kept < plain / 3
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert "MALLOC_TRIM_THRESHOLD_" not in training_environment()
