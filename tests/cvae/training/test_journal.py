import errno
import json
import logging
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvae.training.journal import Journal, read

WRITER = """
import sys
from cvae.training.journal import Journal
journal = Journal(sys.argv[1])
for step in range(1_000_000):
    journal.append("step", step=step, metrics={"train/loss": 1 / (step + 1)})
    print(step, flush=True)
"""


def test_lines_come_back_as_they_went_in(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    before = time.time()
    journal.append("start", world_size=8, hosts=["a", "b"], job_id=None)
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1, "e": 3}
    journal.append("step", step=1, metrics=metrics)
    journal.close()
    records, offset = read(tmp_path / "journal.jsonl")
    assert offset == (tmp_path / "journal.jsonl").stat().st_size
    assert [record["kind"] for record in records] == ["start", "step"]
    assert before <= records[0]["time"] <= time.time()
    assert records[0]["hosts"] == ["a", "b"]
    got = records[1]["metrics"]
    assert math.isnan(got.pop("a"))
    assert got == {"b": math.inf, "c": -math.inf, "d": 0.1, "e": 3.0}
    assert all(type(value) is float for value in got.values())


def test_lines_are_strict_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("step", step=1, metrics={"loss": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_steps_computed_again_after_a_resume_stay_as_first_told(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path)
    for step in range(1, 6):
        assert first.append("step", step=step, metrics={"loss": float(step)})
    first.append("picture", step=5, key="samples", path="pictures/a.png")
    first.close()
    second = Journal(path)
    second.append("start", step=3)
    written = [second.append("step", step=step, metrics={"loss": -1.0}) for step in range(4, 8)]
    assert written == [False, False, True, True]
    assert not second.append("step", step=7, metrics={"loss": 0.0})
    assert second.append("epoch", step=5, epoch=1, metrics={"val/loss": 0.0})
    assert second.append("picture", step=5, key="reconstructions", path="pictures/b.png")
    assert not second.append("picture", step=5, key="samples", path="pictures/a.png")
    assert second.append("start", step=3), "only metrics and pictures are told once"
    losses = {r["step"]: r["metrics"]["loss"] for r in read(path)[0] if r["kind"] == "step"}
    assert losses == {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: -1, 7: -1}


def test_every_cut_of_the_last_line_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("step", step=1, metrics={"loss": 1.0})
    size = path.stat().st_size
    journal.append("step", step=2, metrics={"loss": 2.0})
    journal.close()
    whole = path.read_bytes()
    for cut in range(size, len(whole)):
        path.write_bytes(whole[:cut])
        assert [record["step"] for record in read(path)[0]] == [1]
        resumed = Journal(path)
        assert resumed.append("step", step=2, metrics={"loss": 3.0})
        resumed.close()
        assert [record["metrics"]["loss"] for record in read(path)[0]] == [1.0, 3.0]


def test_reading_on_from_an_offset_gives_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read(path) == ([], 0), "not there yet"
    journal = Journal(path)
    offset, steps = 0, []
    for step in range(50):
        journal.append("step", step=step, metrics={})
        if step % 7 == 0:
            records, offset = read(path, offset)
            steps += [record["step"] for record in records]
    with open(path, "ab") as file:
        file.write(b'{"kind":"step","st')
        file.flush()
        records, offset = read(path, offset)
        steps += [record["step"] for record in records]
        file.write(b'ep":50}\n')
    steps += [record["step"] for record in read(path, offset)[0]]
    assert steps == list(range(51))


@pytest.mark.parametrize(
    "damage", [b"\0\0\0\xff", b"[1]", b'{"step": 1}', b'{"kind":"step","metrics":{"a":null}}', b"7"]
)
def test_a_damaged_line_is_skipped_aloud(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("step", step=1, metrics={})
    size = path.stat().st_size
    journal.close()
    path.write_bytes(path.read_bytes() + damage + b"\n")
    with caplog.at_level(logging.WARNING):
        Journal(path).append("step", step=2, metrics={})
    assert f"at byte {size}" in caplog.text
    assert [record["step"] for record in read(path)[0]] == [1, 2]


@pytest.mark.parametrize("lines_before_kill", [1, 40, 300])
def test_kill_loses_no_line(tmp_path: Path, lines_before_kill: int) -> None:
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(lines_before_kill):
            writer.stdout.readline()
        writer.kill()
        told = lines_before_kill + len(writer.stdout.read().splitlines())
    steps = [record["step"] for record in read(path)[0]]
    assert steps == list(range(len(steps)))
    assert len(steps) >= told


def test_a_full_disk_surfaces_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("step", step=1, metrics={"loss": 1.0})
    # A limit on the size of files cuts a write short and refuses the next, as a full disk does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            journal.append("step", step=2, metrics={"loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes().endswith(b"\n")
    assert journal.append("step", step=2, metrics={"loss": 2.0}), "there is room again"
    assert [record["step"] for record in read(path)[0]] == [1, 2]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Journal(tmp_path / "missing" / "journal.jsonl")


def test_long_runs_open_and_append_fast(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    metrics = {f"train/metric_{i}": math.pi * i for i in range(8)}
    started = time.process_time()
    journal = Journal(path)
    for step in range(10_000):
        journal.append("step", step=step, metrics=metrics)
    journal.close()
    appended = time.process_time()
    Journal(path).close()
    opened = time.process_time()
    assert appended - started < 2, "0.2 ms a line"
    assert opened - appended < 1
