"""A line of setup in the cluster file that fails is named by launch.py, by runs.py show and by --preflight."""

import json
from pathlib import Path

import pytest

from cvae.config.experiment import Experiment
from cvae.run.directory import RunDirectory
from slurm.attempts import log_file
from slurm.cluster_file import Placement
from slurm.failure_diagnosis import SETUP_ERROR
from tests.conftest import tiny_experiment
from tests.helpers.site import Site, site
from workflows import runs
from workflows.jobs.follow import follow
from workflows.jobs.preflight_job import preflight

__all__ = ["site"]
LINE = "the line 'module load cuda/99' failed with status 1"
NAMED = f"setup in the cluster file: {LINE}"


@pytest.fixture
def failed_job(site: Site) -> Site:
    """SLURM takes a job, which fails in its setup at once."""
    site.says("squeue", "*) echo '12|FAILED|NonZeroExitCode|2026-11-25T12:00:00|n1';;")
    site.says("scontrol", "ping*) echo Slurmctld is UP;;", "*) echo JobState=FAILED;;")
    site.says("sinfo", "*) echo 'gpu*|gpu:4|8|1:00:00';;")
    site.says("srun")
    script = site.folder / "sbatch"
    script.write_text(
        "#!/bin/bash\nfor script; do :; done\n"
        f'echo "{SETUP_ERROR}{LINE}" >"${{script%/*}}/12_0_log.out"\n'
        "echo Submitted batch job 12\n"
    )
    return site


def test_by_launch_and_show(
    failed_job: Site, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory.create("r", Experiment.model_validate(tiny_experiment()))
    entry = {"time": 1.0, "cluster": "slurm", "executor": "slurm", "job_id": "12", "host": "login"}
    run.launch_file.write_text(json.dumps([{**entry, "nodes": 1, "gpus": 1, "world_size": 1}]))
    log_file(run.logs, "12", 0).write_text(f"{SETUP_ERROR}{LINE}\n")
    assert follow(run) == 1
    assert NAMED in capsys.readouterr().out
    assert runs.main(["show", "r"]) == 0
    assert NAMED in capsys.readouterr().out


def test_by_preflight(failed_job: Site, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight(Placement(1, 1), "slurm", None) == 1
    assert f"failed: {NAMED}" in capsys.readouterr().out
