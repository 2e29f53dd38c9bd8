"""What this machine is: its device, its packages, the code."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.gpu_check import stand_in
from tests.helpers.rank_processes import PROJECT_ROOT

_PACKAGES = ("numpy", "pydantic", "diffusers", "transformers", "deepspeed", "triton")


def facts() -> dict[str, Any]:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    header = {"device": _device(gpus), "python": platform.python_version()}
    header["torch"] = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if gpus:
        header["torch"] += f", cuDNN {torch.backends.cudnn.version()}"
        header["torch"] += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        header["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    header["packages"] = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    header["commit"] = _commit()
    return {"gpus": gpus, "header": header}


def _device(gpus: int) -> str:
    if not gpus:
        return f"no GPU; CPU, {len(os.sched_getaffinity(0))} cores"
    import torch

    gpu = torch.cuda.get_device_properties(0)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{gpus} × {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"


def _version(package: str) -> str:
    if (known := sys.modules.get(package)) and known.__version__ == stand_in.VERSION:
        return stand_in.VERSION
    if find_spec(package) is None:
        return "missing"
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _commit() -> str:
    commit = _output("git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD")[:12]
    changes = _output("git", "-C", str(PROJECT_ROOT), "status", "--porcelain")
    return f"{commit} with uncommitted changes" if changes not in ("", "unknown") else commit


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if done.returncode != 0:
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def write(result: Path) -> None:
    result.write_text(json.dumps(facts()))
