"""Load of the first rank's host, under the names that MLflow's "System metrics" page knows."""

import time

import psutil
import torch

from cvae.training.device import gpu_metrics

_INTERVAL_S = 10.0


class SystemMetrics:
    """Measures at most once in ten seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._due = time.monotonic()
        psutil.cpu_percent()  # the first call has nothing to compare with

    def measure(self) -> dict[str, float] | None:
        """Metrics by name, or None where the last ones are still fresh. Megabytes are 10⁶ bytes."""
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + _INTERVAL_S
        memory = psutil.virtual_memory()
        network = psutil.net_io_counters()
        metrics = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_percentage": memory.percent,
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
        }
        if network is not None:
            metrics["system/network_receive_megabytes"] = network.bytes_recv / 1e6
            metrics["system/network_transmit_megabytes"] = network.bytes_sent / 1e6
        return metrics | gpu_metrics(self._device)
