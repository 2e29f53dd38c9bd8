"""Ranks that stop making progress end, and report which rank was at fault."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from cvae.distributed.ranks import Ranks
from cvae.distributed.watchdog import Watchdog
from tests.conftest import tiny_experiment
from tests.helpers import ranks

LIMIT_S = 3.0


def watchdog(world_size: int = 1) -> Watchdog:
    here = Ranks(0, world_size, torch.device("cpu"), None)
    return Watchdog(here, [f"n{rank}" for rank in range(world_size)], LIMIT_S)


def test_only_steps_are_timed_and_slow_ones_are_allowed_for() -> None:
    dog, now = watchdog(), time.monotonic()
    assert dog._look(now + 1000) is None, "before the first step"
    dog.beat(1)
    assert dog._look(now + 2) is None
    alarm = dog._look(now + 4)
    assert alarm is not None
    assert "no progress" in alarm.problem
    dog.rest()
    assert dog._look(now + 1000) is None, "an evaluation, a save"


def test_a_step_may_take_ten_times_the_slowest_so_far_and_the_first_is_soon_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = watchdog()
    for step, took, allowed in ((1, 2.0, 20), (2, 1.0, 10), (3, 0.5, 10), (4, 1.5, 15)):
        dog.begin()
        clock[0] += took
        dog.beat(step)
        assert dog._look(clock[0] + allowed - 0.5) is None, step
        assert dog._look(clock[0] + allowed + 0.5) is not None, step


def test_who_is_silent_or_behind_is_named() -> None:
    dog, now = watchdog(3), time.monotonic()
    dog.beat(7)
    dog._store_at = now + 4
    dog._others = {1: (now + 4, "9 7"), 2: (now + 4, "9 6")}
    alarm = dog._look(now + 4)
    assert alarm is not None
    assert alarm.rank == 2, "behind"
    dog._others = {1: (now + 2, "9 7"), 2: (now + 4, "9 7")}
    alarm = dog._look(now + 4)
    assert alarm is not None
    assert (alarm.rank, "silent" in alarm.problem) == (1, True)
    dog.rest()
    assert dog._look(now + 4) is None, "a silence shorter than the limit"
    dog._others = {1: (now, "bye"), 2: (now + 4, "9 7")}
    assert dog._look(now + 4) is None, "gone on purpose"
    dog._others = {1: (now + 9, "9 7"), 2: (now + 9, "9 7")}
    alarm = dog._look(now + 9)
    assert alarm is not None
    assert alarm.rank == 0, "the store cannot be reached"


@pytest.mark.parametrize(("pause_s", "ends"), [(0.5, True), (1000.0, False)])
def test_a_job_that_was_suspended_blames_nobody(
    monkeypatch: pytest.MonkeyPatch, pause_s: float, ends: bool
) -> None:
    """Between two looks half a second passes or, if the whole job was suspended, a long time."""
    clock, alarms = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    dog = watchdog(2)

    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock[0] += pause_s
            return clock[0] > 20 * pause_s

    dog._over = Over()
    monkeypatch.setattr(dog, "_end", alarms.append)
    dog.beat(1)
    dog.watch()
    assert bool(alarms) == ends


@pytest.mark.usefixtures("tiny_store")
def test_a_stopped_rank_ends_the_others_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "failure.json"
    monkeypatch.setenv("CVAE_FAILURE_FILE", str(report))
    monkeypatch.setenv("CVAE_WATCHDOG_S", str(LIMIT_S))
    run = ranks.new_run("r", tiny_experiment(epochs=100_000))
    processes = ranks.start(run, 2)
    try:
        ranks.wait_for_step(run, 5)
        os.kill(processes[1].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        output = processes[0].communicate(timeout=60)[0]
        assert time.monotonic() - stopped < 5 * LIMIT_S
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    assert "Thread 0x" in output, "every thread's stack"
    failure = json.loads(report.read_text())
    assert failure["rank"] == 1
    assert "silent" in failure["error"]
