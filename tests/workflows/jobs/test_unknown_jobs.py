"""Commands about a job of which nobody can say how it stands."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.run.directory import RunDirectory
from slurm import attempts, job_state
from slurm.job_state import Submission
from tests.conftest import tiny_experiment
from tests.helpers.site import GONE, Site, site
from workflows import runs, sweep
from workflows.sweeps.directory import SweepDirectory

__all__ = ["site"]


def entry(**more: Any) -> dict[str, Any]:
    common = {"time": 1.0, "cluster": "c", "executor": "slurm", "job_id": "12", "host": "login"}
    return {**common, "nodes": 1, "gpus": 1, "world_size": 1, **more}


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    run.launch_file.write_text(json.dumps([entry()]))
    monkeypatch.setattr(job_state, "_POLL_S", 0.01)
    monkeypatch.setattr(job_state, "_CANCEL_EVERY_S", 0.05)
    monkeypatch.setattr(job_state, "_CANCEL_PATIENCE_S", 1.0)
    monkeypatch.setattr(runs, "_SAVE_PATIENCE_S", 0.05)
    return run


def test_unknown_is_not_ended_scancel_is_sent_and_repeated(
    site: Site, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    site.fails("squeue", GONE)
    assert runs.main(["cancel", "r"]) == 1
    assert site.times("scancel --signal=TERM 12") == 1
    assert site.times("scancel 12") > 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("r: whether job 12 on c has ended is not known: SLURM says: ")
    assert "Unable to contact slurm controller" in last


def test_a_squeue_that_fails_once_while_cancelling(
    site: Site, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    count = f"$(grep -c ^squeue {site.folder}/asked)"
    gone = f"grep -q '^scancel 12' {site.folder}/asked"
    site.says("squeue", f"*) [ {count} -ne 3 ] || exit 1; {gone} && s=CANCELLED || s=RUNNING;"
              " echo \"12|$s|None|2026-11-25T12:00:00|n1\";;")  # fmt: skip
    assert runs.main(["cancel", "r"]) == 0
    assert site.times("scancel 12") == 1
    assert "cancelled  r" in capsys.readouterr().out


def test_a_scancel_that_fails_is_named_and_repeated(
    site: Site,
    run: RunDirectory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = f"[ $(grep -c '^scancel 12' {site.folder}/asked) -ge 3 ]"
    site.says("squeue", f'*) {ended} && s=CANCELLED || s=RUNNING; echo "12|$s|None|N/A|n1";;')
    site.fails("scancel", GONE, times=2, only="12*")
    monkeypatch.setattr(job_state, "_CANCEL_PATIENCE_S", 20.0)
    assert runs.main(["cancel", "r"]) == 0
    out = capsys.readouterr().out
    assert out.count("scancel failed: SLURM says: ") == 1


@pytest.mark.parametrize("squeue", ["fails", "is missing", "hangs"])
def test_nothing_is_resumed_while_the_state_is_unknown(
    site: Site, run: RunDirectory, squeue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if squeue == "fails":
        site.fails("squeue", GONE)
    elif squeue == "is missing":
        site.lacks("squeue")
    else:
        monkeypatch.setattr("slurm.commands._TIMEOUT_S", 0.1)
        monkeypatch.setattr(
            "slurm.commands.Slurm._run.__kwdefaults__",
            {"stdin": None, "timeout": 0.1, "both": False},
        )
        site.says("squeue", "*) exec sleep 5;;")
    words = {"fails": "Unable to contact", "is missing": "not installed", "hangs": "did not answer"}
    submitted: list[str] = []
    monkeypatch.setattr("slurm.executors.submit", lambda *a: submitted.append("yes"))
    resume = ["resume", "r", "--cluster", "local", "--detach"]
    with pytest.raises(
        UserError, match=f"job 12 on c still runs is not known: .*{words[squeue]}.*--force"
    ):
        runs.main(resume)
    assert not submitted
    with pytest.raises(AttributeError):  # the stand-in gives no submission to write down
        runs.main([*resume, "--force"])
    assert submitted == ["yes"]


def test_runs_are_listed_and_shown_without_squeue(
    site: Site, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    site.lacks("squeue")
    attempts.write(run.logs, "12", [attempts.Attempt(1, 1.0, ["n1"])])
    assert runs.main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[1].split()[:2] == ["r", "unknown"]
    assert listed[2] == "unknown: SLURM's squeue is not installed here"
    assert runs.main(["show", "r"]) == 0
    assert "unknown: SLURM's squeue is not installed here" in capsys.readouterr().out


@pytest.mark.parametrize("sacct", ["missing", "fails"])
def test_a_job_that_the_queue_has_forgotten_has_ended_without_accounting_too(
    site: Site, run: RunDirectory, sacct: str
) -> None:
    site.fails("squeue", "slurm_load_jobs error: Invalid job id specified")
    if sacct == "missing":
        site.lacks("sacct")
    else:
        site.fails("sacct", "sacct: error: slurmdbd: Connection refused")
    assert job_state.look(Submission.model_validate(entry())).phase == "ended"


def test_a_local_job_of_another_host_name(run: RunDirectory) -> None:
    mine = {"executor": "local", "process_started": time.time(), "job_id": f"{os.getsid(0)}-1"}
    here = entry(**mine, host="renamed", machine=job_state.this_machine())
    assert job_state.look(Submission.model_validate(here)).phase != "unknown"
    for elsewhere in (entry(**mine, host="other"), entry(**mine, host="other", machine="x y")):
        run.launch_file.write_text(json.dumps([elsewhere]))
        assert job_state.look(Submission.model_validate(elsewhere)).phase == "unknown"
        with pytest.raises(UserError, match=r"started on other, which is not here; .*--force"):
            runs.main(["resume", "r", "--cluster", "local"])
        with pytest.raises(UserError, match="started on other"):
            runs.main(["cancel", "r"])


def test_sweeps_have_the_same_rule(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sweep:
        name, path = "s", home
        launches = staticmethod(lambda: [{"address": None, "gpus_per_trial": 1}])
        submissions = staticmethod(
            lambda: [Submission.model_validate(entry(executor="local", host="other"))]
        )
        experiment = staticmethod(lambda: None)

    monkeypatch.setattr(SweepDirectory, "open", lambda name: Sweep)
    monkeypatch.setattr("workflows.sweeps.live_view.is_finished", lambda sweep: False)
    with pytest.raises(UserError, match=r"s: whether process 12 on other still runs .*--force"):
        sweep.main(["--resume", "s"])

    def allocate(options: Any, experiment: Any) -> Any:
        raise UserError("went on")

    monkeypatch.setattr(sweep, "_allocate", allocate)
    with pytest.raises(UserError, match="went on"):
        sweep.main(["--resume", "s", "--force"])
