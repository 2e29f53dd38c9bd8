"""A host's load: never the reason why a run ends, and only what the run itself has sent."""

from types import SimpleNamespace

import psutil
import pytest
import torch

from cvae.training.system_metrics import SystemMetrics


def test_what_a_host_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> None:
        raise RuntimeError("no /proc here")

    for name in ("cpu_percent", "virtual_memory", "net_io_counters", "Process"):
        monkeypatch.setattr(psutil, name, refuse)
    assert SystemMetrics(torch.device("cpu")).measure() == {}


def test_the_network_is_counted_from_the_start_without_the_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = {"lo": [10**9, 10**9], "eth0": [5_000_000, 1_000_000], "ib0": [0, 0]}

    def counters(pernic: bool = False) -> object:
        each = {
            name: SimpleNamespace(bytes_recv=received, bytes_sent=sent)
            for name, (received, sent) in counts.items()
        }
        return each if pernic else each["lo"]

    monkeypatch.setattr(psutil, "net_io_counters", counters)
    system = SystemMetrics(torch.device("cpu"))
    counts |= {"lo": [10**10, 10**10], "eth0": [7_000_000, 2_000_000], "ib0": [1_000_000, 0]}
    metrics = system.measure()
    assert metrics is not None
    assert metrics["system/network_receive_megabytes"] == 3.0
    assert metrics["system/network_transmit_megabytes"] == 1.0
