"""Waiting for what other processes do, and this machine as the place of a job."""

import time
from collections.abc import Callable

from slurm.cluster_file import ClusterConfig, Place

HERE = Place("local", ClusterConfig(executor="local", env={"COLOUR": "blue"}), "requested")


def until(condition: Callable[[], object], seconds: float = 180, poll_s: float = 0.05) -> None:
    """Returns once the condition holds; fails after that many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited for {seconds:g} s"
        time.sleep(poll_s)
