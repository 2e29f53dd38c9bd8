"""Load of the first rank's host, under the names that MLflow's "System metrics" page knows.

A rank asks CUDA about its own GPU alone: CUDA opens a context (hundreds of megabytes) on every GPU that it is
asked about, and a GPU in exclusive mode refuses a second process. NVML, if the package nvidia-ml-py is installed,
opens none, and reports every GPU of the host.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import psutil
import torch

from cvae.distributed.device import Memory, memory

_INTERVAL_S = 10.0
Questions = Mapping[str, Callable[..., float]]
_HOST: Questions = {
    "cpu_utilization_percentage": lambda before: psutil.cpu_percent(),
    "system_memory_usage_percentage": lambda before: psutil.virtual_memory().percent,
    "system_memory_usage_megabytes": lambda before: psutil.virtual_memory().used / 1e6,
    "process_memory_megabytes": lambda before: psutil.Process().memory_info().rss / 1e6,
    "network_receive_megabytes": lambda before: (_network()[0] - before[0]) / 1e6,
    "network_transmit_megabytes": lambda before: (_network()[1] - before[1]) / 1e6,
}
_GPU: Questions = {
    "utilization_percentage": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "memory_usage_percentage": lambda nvml, gpu: _used(nvml.nvmlDeviceGetMemoryInfo(gpu)),
    "power_usage_watts": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
}
_OWN_GPU: Questions = {"memory_usage_percentage": lambda device: _used(memory(device))}


class SystemMetrics:
    """Measures at most once in ten seconds and never raises: a metric that the host refuses is left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._due = time.monotonic()
        self._before: tuple[int, int] | None = None
        with suppress(Exception):
            self._before = _network()
        with suppress(Exception):
            psutil.cpu_percent()  # the first call has nothing to compare with

    def measure(self) -> dict[str, float] | None:
        """Returns metrics by name, or None if the last ones are still fresh.

        Megabytes are 10⁶ bytes. The network's are counted since this object was made, without the loopback.
        """
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + _INTERVAL_S
        return _answers("system/", _HOST, self._before) | gpu_metrics(self._device)


def gpu_metrics(device: torch.device) -> dict[str, float]:
    """Returns the load of this host's GPUs, of this rank's own without NVML; {} on a CPU. Never raises."""
    if device.type != "cuda":
        return {}
    try:
        return _nvml_metrics()
    except Exception:  # not installed, no driver, a driver of another version
        return _answers(f"system/gpu_{device.index or 0}_", _OWN_GPU, device)


def _nvml_metrics() -> dict[str, float]:
    import pynvml as nvml  # type: ignore[import-not-found, import-untyped, unused-ignore]

    nvml.nvmlInit()
    try:
        metrics: dict[str, float] = {}
        for index in range(nvml.nvmlDeviceGetCount()):
            gpu = nvml.nvmlDeviceGetHandleByIndex(index)
            metrics |= _answers(f"system/gpu_{index}_", _GPU, nvml, gpu)
        return metrics
    finally:
        nvml.nvmlShutdown()


def _answers(prefix: str, questions: Questions, *arguments: Any) -> dict[str, float]:
    """Returns the answers by prefixed name; a question that raises is left out."""
    answers = {}
    for name, ask in questions.items():
        with suppress(Exception):
            answers[prefix + name] = float(ask(*arguments))
    return answers


def _used(memory: Memory) -> float:
    """Returns the used percentage of a GPU's memory."""
    return 100 * (1 - memory.free / memory.total)


def _network() -> tuple[int, int]:
    """Returns the bytes that this host has received and sent since it started, without its loopback."""
    counters = psutil.net_io_counters(pernic=True)
    outside = [count for name, count in counters.items() if not name.startswith("lo")]
    return sum(one.bytes_recv for one in outside), sum(one.bytes_sent for one in outside)
