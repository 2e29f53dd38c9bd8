"""Load of the first rank's host, under the names that MLflow's "System metrics" page knows."""

import time
from contextlib import suppress

import psutil
import torch

from cvae.distributed.device import gpu_metrics

_INTERVAL_S = 10.0


class SystemMetrics:
    """Measures at most once in ten seconds, and never raises: what the host does not answer is left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._due = time.monotonic()
        self._before = _network()
        with suppress(Exception):
            psutil.cpu_percent()  # the first call has nothing to compare with

    def measure(self) -> dict[str, float] | None:
        """Returns metrics by name, or None if the last ones are still fresh.

        Megabytes are 10⁶ bytes. The network's are counted from this object's making on, without the loopback.
        """
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + _INTERVAL_S
        metrics: dict[str, float] = {}
        with suppress(Exception):
            metrics["system/cpu_utilization_percentage"] = psutil.cpu_percent()
        with suppress(Exception):
            memory = psutil.virtual_memory()
            metrics["system/system_memory_usage_percentage"] = memory.percent
            metrics["system/system_memory_usage_megabytes"] = memory.used / 1e6
        with suppress(Exception):
            metrics["system/process_memory_megabytes"] = psutil.Process().memory_info().rss / 1e6
        if self._before is not None and (now := _network()) is not None:
            for name, before, after in zip(("receive", "transmit"), self._before, now, strict=True):
                metrics[f"system/network_{name}_megabytes"] = (after - before) / 1e6
        return metrics | gpu_metrics(self._device)


def _network() -> tuple[int, int] | None:
    """Returns the bytes that this host has received and sent since it was started, without its loopback.

    None if the host does not say.
    """
    try:
        counters = psutil.net_io_counters(pernic=True)
    except Exception:
        return None
    outside = [count for name, count in counters.items() if not name.startswith("lo")]
    return sum(one.bytes_recv for one in outside), sum(one.bytes_sent for one in outside)
