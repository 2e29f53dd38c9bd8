"""The one query of a device: about this rank's own alone, and without an error where it is a metric."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cvae.training.system_metrics import gpu_metrics

OWN = torch.device("cuda", 2)


def test_a_rank_asks_about_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking about another one would open a CUDA context there."""
    queried = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        queried.append(device)
        return 25, 100

    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    assert gpu_metrics(OWN) == {"system/gpu_2_memory_usage_percentage": 75}
    assert queried == [OWN]
    assert gpu_metrics(torch.device("cpu")) == {}


def test_no_metric_rather_than_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=refuses))
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuses)
    assert gpu_metrics(OWN) == {}


def test_nvml_tells_of_every_gpu_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def utilization(handle: int) -> Any:
        if handle == 1:
            raise ValueError("Not Supported")  # as of a part of a GPU
        return SimpleNamespace(gpu=87)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=3, free=1, total=4),
        nvmlDeviceGetPowerUsage=lambda handle: 250_500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_metrics(OWN) == {
        "system/gpu_0_utilization_percentage": 87,
        "system/gpu_0_memory_usage_percentage": 75,
        "system/gpu_0_power_usage_watts": 250.5,
        "system/gpu_1_memory_usage_percentage": 75,
        "system/gpu_1_power_usage_watts": 250.5,
    }
