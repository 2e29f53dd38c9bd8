"""What is known of this rank's own device, asked in one place.

A rank asks about no device but its own: CUDA opens a context (hundreds of megabytes) on every GPU that it is
asked about, and a GPU in exclusive mode refuses a second process. The other GPUs of a host are known to NVML,
which opens none; it is used if the package nvidia-ml-py (`pynvml`) is installed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Device(NamedTuple):
    name: str
    """ "cpu" without a GPU."""
    id: str
    """The GPU's UUID, by which two ranks on one GPU are recognised; "cpu" without a GPU."""
    capability: tuple[int, int] | None
    """The compute capability; None without a GPU."""


class Memory(NamedTuple):
    """Bytes of the GPU; without one, of the host."""

    free: int
    total: int


def default_device() -> torch.device:
    """Returns the GPU that this process sees first, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device("cpu", "cpu", None)
    found = torch.cuda.get_device_properties(device)
    id = str(getattr(found, "uuid", device))
    return Device(found.name, id, (found.major, found.minor))


def memory(device: torch.device) -> Memory:
    """Raises RuntimeError if the driver refuses to answer."""
    if device.type != "cuda":
        import psutil  # what draws from an exported folder has no need of it

        host = psutil.virtual_memory()
        return Memory(host.available, host.total)
    return Memory(*torch.cuda.mem_get_info(device))


def gpu_metrics(device: torch.device) -> dict[str, float]:
    """Returns the load of this host's GPUs under MLflow's names, and never raises: what is unknown is left out.

    With NVML these are all GPUs of the host that the driver shows, by the driver's numbers, without it the memory
    of this rank's own. Without a GPU there are none.
    """
    if device.type != "cuda":
        return {}
    try:
        return _all_by_nvml()
    except Exception:  # not installed, no driver, a driver of another version
        pass
    try:
        free, total = memory(device)
    except RuntimeError:
        return {}
    return {f"system/gpu_{device.index or 0}_memory_usage_percentage": 100 * (1 - free / total)}


def _all_by_nvml() -> dict[str, float]:
    import pynvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

    pynvml.nvmlInit()
    try:
        metrics: dict[str, float] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for name, value in _of_one(pynvml, handle).items():
                metrics[f"system/gpu_{index}_{name}"] = value
        return metrics
    finally:
        pynvml.nvmlShutdown()


def _of_one(nvml: Any, handle: Any) -> dict[str, float]:
    """Returns what this GPU answers; a part of a GPU (MIG), for example, has no utilization of its own."""
    questions: dict[str, Callable[[], float]] = {
        "utilization_percentage": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        "memory_usage_percentage": lambda: 100 * _used(nvml, handle),
        "power_usage_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
    }
    answers = {}
    for name, ask in questions.items():
        try:
            answers[name] = float(ask())
        except Exception:  # NVMLError, of a class per reason
            continue
    return answers


def _used(nvml: Any, handle: Any) -> float:
    told = nvml.nvmlDeviceGetMemoryInfo(handle)
    return float(told.used / told.total)
