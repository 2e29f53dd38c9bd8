"""What a run was made of: code, packages, machine."""

import os
import socket
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cvae.data.experiment_data import ExperimentData
from cvae.data.store import MANIFEST
from cvae.distributed.device import describe
from cvae.distributed.ranks import Ranks
from cvae.run import code_snapshot

_PACKAGES = (
    "torch",
    "deepspeed",
    "numpy",
    "safetensors",
    "transformers",
    "diffusers",
    "submitit",
    "mlflow",
)


def facts(data: ExperimentData, ranks: Ranks, precision: str) -> dict[str, Any]:
    """The fields of the journal's start line; called on all ranks, for the hosts' names."""
    code = code_snapshot.read()
    return {
        "world_size": ranks.world_size,
        "hosts": ranks.gather(socket.gethostname()),
        "device": describe(ranks.device).name,
        "precision": precision,
        "job_id": os.environ.get("SLURM_JOB_ID", f"pid {os.getpid()}"),
        "code": code.source,
        "commit": code.commit,
        "uncommitted_changes": code.uncommitted_changes,
        "packages": package_versions(),
        "data_name": data.store.manifest.dataset,
        "data_digest": data.digest,
        "data_manifest": str(data.store.path / MANIFEST),
    }


def package_versions() -> dict[str, str | None]:
    """None for one that is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
