"""The code, packages, machines and data that a run is made from."""

import os
import socket
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from cvae.data.experiment_data import ExperimentData
from cvae.data.store import MANIFEST
from cvae.distributed.device import describe
from cvae.distributed.ranks import Ranks
from cvae.run import code_snapshot

_PACKAGES = [
    "torch",
    "deepspeed",
    "numpy",
    "safetensors",
    "transformers",
    "diffusers",
    "submitit",
    "mlflow",
]


def facts(data: ExperimentData, ranks: Ranks, precision: str) -> dict[str, Any]:
    """Returns the fields of the journal's start line. All ranks call it together."""
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
    """Returns the version of each package that affects results; None if it is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
