"""Locks on files, on file systems with and without flock."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cvae.files import file_lock as module
from cvae.files.file_lock import Locked, file_lock, has_flock

# The code that makes a process see a file system with flock, without flock, or without any kernel locks.
SITES = {
    "flock": "",
    "bytes": "fcntl.flock = refuse",
    "files": "fcntl.flock = fcntl.fcntl = refuse",
}
REFUSE = """
import errno, fcntl, sys, time
from pathlib import Path
def refuse(*_): raise OSError(errno.ENOLCK, "No locks available")
"""
HOLD = """
from cvae.files.file_lock import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
# Each process adds 1 whenever it gets the lock; a sum that is too small shows that two held it at once.
COUNT = """
from cvae.files.file_lock import file_lock
number = Path(sys.argv[1]).with_name("number")
for _ in range(10):
    with file_lock(Path(sys.argv[1]), 60):
        value = int(number.read_text())
        time.sleep(0.002)
        number.write_text(str(value + 1))
"""


@pytest.fixture(params=SITES)
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    if request.param != "flock":
        monkeypatch.setattr(fcntl, "flock", refuse)
    if request.param == "files":
        monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(module, "_warned_folders", set())
    monkeypatch.setattr(module, "_SAME_MOMENT_S", 0.05)
    return str(request.param)


def program(site: str, text: str, path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", REFUSE + SITES[site] + "\n" + text, str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@contextmanager
def holder(site: str, path: Path) -> Iterator["subprocess.Popen[str]"]:
    process = program(site, HOLD, path)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def is_free(path: Path) -> bool:
    try:
        with file_lock(path):
            return True
    except Locked:
        return False


def test_a_lock_is_exclusive_and_ends_with_its_process(site: str, tmp_path: Path) -> None:
    path = tmp_path / "train.lock"
    with holder(site, path) as process:
        assert not is_free(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert is_free(path)
    assert os.listdir(tmp_path) == ["train.lock"]


def test_a_thread_waits_for_the_lock_of_another_thread(site: str, tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def wait() -> None:
        with file_lock(path, 30):
            order.append("second")

    with file_lock(path):
        # Opening and closing the file would release a POSIX lock that belongs to the process.
        path.read_bytes()
        assert not is_free(path)
        began = time.monotonic()
        with pytest.raises(Locked), file_lock(path, 0.3):
            pass
        assert 0.2 < time.monotonic() - began < 5
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_only_one_of_many_processes_holds_the_lock_at_a_time(site: str, tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    processes = [program(site, COUNT, tmp_path / "lock") for _ in range(3)]
    for process in processes:
        process.communicate()
    assert (tmp_path / "number").read_text() == "30"
    assert sorted(os.listdir(tmp_path)) == ["lock", "number"]


def test_a_missing_flock_is_reported_once_for_a_folder(
    site: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for name in ("a", "b", "a"):
            with file_lock(tmp_path / name):
                pass
    lines = [record.message for record in caplog.records]
    assert len(lines) == (site != "flock")
    assert all(str(tmp_path) in line and "flock" in line for line in lines)
    assert has_flock(tmp_path) == (site == "flock")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_can_be_locked(site: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with file_lock(folder):
        assert not is_free(folder)
    assert is_free(folder)
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    ("owner", "age_s", "free"),
    [
        (lambda here: here._replace(host="elsewhere"), 10, False),
        (lambda here: here._replace(host="elsewhere"), 80, True),
        (lambda here: here._replace(pids="1"), 10, False),  # a container
        (lambda here: here._replace(boot="0"), 10, True),
        (
            lambda here: here._replace(began="1"),
            10,
            True,
        ),  # another process has its number now
        (
            lambda here: here,
            1000,
            False,
        ),  # this process is alive, however old its file is
    ],
)
@pytest.mark.parametrize("site", ["files"], indirect=True)
def test_the_file_of_a_process_that_has_ended_does_not_count(
    site: str, tmp_path: Path, owner: Callable[[Any], Any], age_s: float, free: bool
) -> None:
    file = tmp_path / f"lock.held,{owner(module._Owner.new()).name}"
    file.touch()
    os.utime(file, (time.time() - age_s,) * 2)
    assert is_free(tmp_path / "lock") == free
    assert file.exists() != free


@pytest.mark.parametrize("site", ["files"], indirect=True)
def test_a_holder_shows_other_hosts_that_it_is_alive(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOUCH_EVERY_S", 0.02)
    with file_lock(tmp_path / "lock"):
        [file] = tmp_path.glob("lock.held,*")
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 10
        while file.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 1


def test_nothing_else_uses_flock() -> None:
    root = Path(__file__).parents[3]
    users = [
        file.relative_to(root).as_posix()
        for folder in ("cvae", "slurm", "workflows", "analysis")
        for file in (root / folder).rglob("*.py")
        if "fcntl.flock" in file.read_text("utf-8") or "lockf" in file.read_text("utf-8")
    ]
    assert users == ["cvae/files/file_lock.py"]


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output"), file_lock(tmp_path / "a"):
        pass
