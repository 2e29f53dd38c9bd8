"""The private names of libraries that this project uses, so that an upgrade that drops one is noticed.

A failure here says what to look at: the bound in pyproject.toml holds the version that is known to work.
"""

import inspect
import signal
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from slurm import executors
from slurm.cluster_file import ClusterConfig, Placement
from slurm.executors import Job


def assert_has(owner: object, names: Collection[str], used_in: str) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    assert not missing, f"{owner} lacks {', '.join(missing)}, which {used_in} needs"


def test_submitits_batch_script() -> None:
    """executors.sbatch_script() shows the script that a SlurmExecutor would submit."""
    from submitit.slurm.slurm import _make_sbatch_string

    known = inspect.signature(_make_sbatch_string).parameters
    job = Job("j", Path("/f"), "m:f", (), {})
    asked = executors._parameters(job, ClusterConfig(executor="slurm"), Placement(1, 1))
    unknown = {"command", "folder", *asked} - set(known)
    assert not unknown, f"submitit's _make_sbatch_string no longer takes {', '.join(unknown)}"
    script = executors.sbatch_script(job, ClusterConfig(executor="slurm"), Placement(2, 4))
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=4", "submitit.core._submit /f"):
        assert line in script, f"submitit's batch script has no {line!r}"


def test_submitits_local_executor(monkeypatch: Any, tmp_path: Path) -> None:
    """slurm/local_jobs.py replaces how submitit starts and watches its processes."""
    from submitit.local.local import Controller, LocalExecutor

    parent = ["_submit_command", "_internal_update_parameters"]
    assert_has(LocalExecutor, parent, "slurm/local_jobs.py")
    methods = ["start_tasks", "kill_tasks", "_forward_signal"]
    assert_has(Controller, methods, "slurm/local_jobs.py")
    for name, value in (("COMMAND", "true"), ("NTASKS", "1"), ("TIMEOUT_S", "0")):
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    for name in ("LOCAL_SIGNAL_DELAY_S", "LOCAL_WITH_SHELL", "STDERR_TO_STDOUT"):
        monkeypatch.setenv(f"SUBMITIT_{name}", "0" if name.endswith("_S") else "")
    before = signal.getsignal(signal.SIGTERM)
    try:
        controller = Controller(tmp_path)
        assert_has(controller, ["tasks", "folder", "pid"], "slurm/local_jobs.py")
        assert signal.getsignal(signal.SIGTERM) == controller._forward_signal
    finally:
        signal.signal(signal.SIGTERM, before)


def test_rays_scheduler() -> None:
    """workflows/sweeps/driver.py tells ASHA what trials have reached before a restart."""
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(metric="loss", mode="min", time_attr="epoch")
    assert_has(scheduler, ("_trial_info", "_metric", "_metric_op"), "workflows/sweeps/driver.py")
    [bracket] = scheduler._brackets
    asked = list(inspect.signature(bracket.on_result).parameters)
    assert len(asked) == 3, f"ASHA's bracket takes {asked}, not (trial, epoch, value)"


def test_rays_address_of_a_node() -> None:
    import ray

    accepted = inspect.signature(ray.init).parameters
    assert "kwargs" in accepted or "_node_ip_address" in accepted, "see slurm/ray_cluster.py"
    assert "_node_ip_address" in inspect.getsource(ray.init), "see slurm/ray_cluster.py"


def test_deepspeeds_fragments_of_parameters(monkeypatch: Any) -> None:
    """cvae/training/zero_state.py finds each rank's part of a parameter in DeepSpeed's own mapping."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.utils import link_hp_params

    parameter = torch.nn.Parameter(torch.zeros(6))
    flat = torch.zeros(4)
    link_hp_params([parameter], flat, {}, {}, False, 0, 2, 4, None)
    assert_has(parameter, ["_hp_mapping"], "cvae/training/zero_state.py")
    fragment = parameter._hp_mapping  # type: ignore[attr-defined]
    own, there = fragment.hp_fragment_address, fragment.lp_fragment_address
    assert (own.start, own.numel, there.start, there.numel) == (0, 4, 2, 4)


def test_deepspeeds_table_of_operations() -> None:
    """cvae/training/deepspeed_engine.py marks an operation as missing before DeepSpeed tries to compile it.

    Only the source is read, as to look the table up would fill it, which takes seconds.
    """
    package = find_spec("deepspeed")
    assert package is not None
    assert package.origin is not None
    source = Path(package.origin).with_name("ops") / "__init__.py"
    assert "__compatible_ops__" in source.read_text(), "see cvae/training/deepspeed_engine.py"


def test_mlflows_client() -> None:
    """analysis/mlflow_runs.py sends a request of its own with the client's credentials."""
    from mlflow import MlflowClient
    from mlflow.store.tracking.rest_store import RestStore

    client = MlflowClient("http://localhost:1")
    assert_has(client, ["_tracking_client"], "analysis/mlflow_runs.py")
    assert isinstance(client._tracking_client.store, RestStore)
    assert_has(client._tracking_client.store, ["get_host_creds"], "analysis/mlflow_runs.py")
