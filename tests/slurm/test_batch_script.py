"""The batch script and its ranks on real sites: their modules, environments, bindings, names of hosts."""

import os
import re
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slurm import executors
from slurm.attempts import log_file
from slurm.cluster_file import ClusterConfig, Placement
from slurm.executors import Job
from slurm.failure_diagnosis import first_failure
from slurm.rank_process import export_ranks


def batch(
    tmp_path: Path, setup: list[str], inherited: dict[str, str] | None = None, **env: str
) -> tuple[int, str, dict[str, str]]:
    """Runs the batch script with an srun that writes down its environment; returns status, output, environment."""
    seen = tmp_path / "seen"
    (tmp_path / "srun").write_text(f"#!/bin/bash\nenv -0 > {seen}\n")
    (tmp_path / "srun").chmod(0o755)
    config = ClusterConfig(executor="slurm", setup=setup, env=env)
    job = Job("j", tmp_path, "m:f", (), {"PYTHONPATH": "/code"})
    script = tmp_path / "job.sh"
    script.write_text(executors.sbatch_script(job, config, Placement(1, 1)))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **(inherited or {})}
    done = subprocess.run(
        ["bash", script], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    lines = seen.read_text().split("\0") if seen.exists() else []
    return done.returncode, done.stdout, dict(line.split("=", 1) for line in lines if line)


# What a site's module command may be: a function that has harmless failures inside.
MODULE = 'module() { false; [ "$2" != cuda/99 ]; }'


@pytest.mark.parametrize(
    ("line", "good"),
    [
        ("module load cuda/99", False),
        ("nosuchcommand --now  # of another site", False),
        ("source ./absent.sh", False),
        (". '/absent dir/x'", False),
        ("cd '/absent dir'", False),
        ("false | grep x", False),
        ("module load cuda/12", True),
        ("source ./env.sh", True),  # its inside and its last command fail
        (". 'my env.sh'", True),
        ("[ -d /absent ] && export X=1", True),
        ("if false; then echo; else export X=2; fi", True),
        ("false || true", True),
        ("export WHERE=$PWD", True),
    ],
)
def test_a_line_of_setup_that_fails_ends_the_job_and_is_named(
    tmp_path: Path, line: str, good: bool
) -> None:
    for name in ("env.sh", "my env.sh"):
        (tmp_path / name).write_text("false\nexport SOURCED=1\nfalse\n")
    status, output, seen = batch(tmp_path, [MODULE, "export FIRST=1", line, "export LAST=1"])
    if good:
        assert (status, output, seen["FIRST"], seen["LAST"]) == (0, "", "1", "1")
        assert ("SOURCED" in seen) == ("env.sh" in line)
    else:
        assert (status, seen) == (1, {})
        log_file(tmp_path, "12", 0).write_text(output)
        failure = first_failure(tmp_path, "12")
        assert failure is not None
        assert failure.end.cause == "setup"
        assert f"'{line}' failed with status" in failure.end.message


def test_a_command_of_setup_over_several_lines(tmp_path: Path) -> None:
    lines = ["if false; then", "  exit 5", "else", "  export X=1 \\", "    Y=2", "fi"]
    status, _, seen = batch(tmp_path, lines)
    assert (status, seen["X"], seen["Y"]) == (0, "1", "2")


def test_modules_do_not_override_env_and_srun_withholds_nothing(tmp_path: Path) -> None:
    setup = ["export NCCL_DEBUG=WARN LD_LIBRARY_PATH=/module PYTHONPATH=/module TEST=$TEST+"]
    none = {"SLURM_EXPORT_ENV": "NONE"}
    status, _, seen = batch(tmp_path, setup, none, NCCL_DEBUG="INFO", TEST="env")
    assert status == 0
    assert (seen["NCCL_DEBUG"], seen["TEST"]) == ("INFO", "env")
    assert seen["LD_LIBRARY_PATH"] == "/module"
    assert seen["PYTHONPATH"].split(":") == ["/code", "/module"]
    assert "SLURM_EXPORT_ENV" not in seen


def of_slurm(**more: Any) -> Any:
    fields = {"cluster": "slurm", "hostnames": ["n1", "n2"], "job_id": "7", "global_rank": 5}
    fields |= {"local_rank": 1, "num_tasks": 8, "num_nodes": 2}
    return SimpleNamespace(**fields | more)


@pytest.mark.parametrize(
    ("setup", "env", "address", "port"),
    [
        ([], {}, "n1", "10007"),  # what the submitting shell had is not meant for this job
        (["export MASTER_ADDR=n1i"], {}, "n1i", "10007"),
        ([], {"MASTER_ADDR": "n1i", "MASTER_PORT": "6000"}, "n1i", "6000"),
        (['export MASTER_ADDR="$(hostname)i"'], {}, f"{socket.gethostname()}i", "10007"),
    ],
)
def test_the_sites_own_address_of_the_first_rank_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setup: list[str],
    env: dict[str, str],
    address: str,
    port: str,
) -> None:
    shell = {"MASTER_ADDR": "earlier", "MASTER_PORT": "1", "GLOO_SOCKET_IFNAME": "ib0"}
    _, _, seen = batch(tmp_path, setup, shell, **env)
    monkeypatch.setattr(os, "environ", seen)
    export_ranks(of_slurm())
    assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == (address, port)
    assert (seen["GLOO_SOCKET_IFNAME"], seen["RANK"], seen["LOCAL_WORLD_SIZE"]) == ("ib0", "5", "4")


@pytest.mark.parametrize(
    ("bound_to", "requested", "cores"),
    [
        (8, "8", "8"),  # bound to its own: not divided again
        (64, "8", "8"),  # not bound at all
        (64, "", "16"),
        (32, "8", "8"),  # bound to its job's
        (2, "8", "2"),  # a node that claims more cores than it has
    ],
)
def test_a_task_takes_the_cores_that_slurm_gives_it(
    monkeypatch: pytest.MonkeyPatch, bound_to: int, requested: str, cores: str
) -> None:
    monkeypatch.setattr(os, "environ", {"SLURM_CPUS_PER_TASK": requested, "CVAE_MASTER_PORT": "1"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound_to)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    export_ranks(of_slurm())
    assert os.environ["CVAE_CORES"] == cores
    export_ranks(of_slurm(cluster="local"))
    assert "CVAE_CORES" not in os.environ


@pytest.mark.parametrize(
    ("nodes", "least_start_s", "least_watchdog_s"), [(1, 300, 90), (64, 1800, 240)]
)
def test_ranks_wait_longer_for_each_other_on_more_nodes(
    tmp_path: Path, nodes: int, least_start_s: int, least_watchdog_s: int
) -> None:
    """By default through a minute of a file server's failing over, and a cold start of all."""
    for keys in ({}, {"start_s": 7, "watchdog_s": 5}):
        config = ClusterConfig.model_validate({"executor": "slurm", **keys})
        script = executors.sbatch_script(
            Job("j", tmp_path, "m:f", (), {}), config, Placement(nodes, 1)
        )
        [start_s] = {int(x) for x in re.findall(r"CVAE_START_S=(\d+)", script)}
        [watchdog_s] = {int(x) for x in re.findall(r"CVAE_WATCHDOG_S=(\d+)", script)}
        if keys:
            assert (start_s, watchdog_s) == (7, 5)
        else:
            assert start_s >= least_start_s
            assert watchdog_s >= least_watchdog_s


@pytest.mark.parametrize("once_per_node", [False, True])
def test_a_lost_node_ends_a_training_but_not_a_sweep(tmp_path: Path, once_per_node: bool) -> None:
    job = Job("j", tmp_path, "m:f", (), {}, once_per_node=once_per_node)
    script = executors.sbatch_script(job, ClusterConfig(executor="slurm"), Placement(2, 4))
    srun = script.strip().splitlines()[-1]
    assert ("--no-kill --kill-on-bad-exit=0 --wait=0" in srun) == once_per_node
    assert ("--kill-on-bad-exit=1" in srun) != once_per_node
