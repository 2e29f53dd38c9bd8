import errno
import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cvae.run import journal
from cvae.run.journal import Journal, read, read_outline, training_seconds
from cvae.run.journal_lines import BadLine, Line, decode

WRITER = """
import sys
from cvae.run.journal import Journal
journal = Journal(sys.argv[1])
for step in range(1_000_000):
    journal.append("step", step=step, metrics={"train/loss": 1 / (step + 1)})
    print(step, flush=True)
"""


def test_lines_come_back_as_they_went_in(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    before = time.time()
    journal.append("start", step=0, world_size=8, hosts=["a", "b"], job_id=None)
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


def test_steps_computed_again_after_a_resume_stay_as_first_written(tmp_path: Path) -> None:
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
    assert second.append("start", step=3), "only metrics and pictures are written once"
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
        file.write(b'{"time":1,"kind":"step","metrics":{},"st')
        file.flush()
        records, offset = read(path, offset)
        steps += [record["step"] for record in records]
        file.write(b'ep":50}\n')
    steps += [record["step"] for record in read(path, offset)[0]]
    assert steps == list(range(51))


GOOD: dict[str, Line] = {
    "start": {"step": 0, "world_size": 2, "hosts": ["a", "b"], "device": "cpu", "commit": None},
    "preflight": {
        "hosts": {"a": {"free_disk": None, "free_memory": 1, "clock_offset_s": -0.1}},
        "seconds": 0.5,
        "all_reduce": {"latency_s": 1e-4, "bytes": 8, "seconds": 0.1},
    },
    "step": {"step": 1, "metrics": {"train/loss": "nan", "train/kl": 2}},
    "system": {"step": 1, "metrics": {"system/cpu": 0.5}},
    "epoch": {"step": 1, "epoch": 1, "metrics": {"val/loss": "-inf"}},
    "evaluation": {"step": 1, "key": "val/fid", "metrics": {"eval/fid": 1.0}},
    "picture": {"step": 1, "key": "samples", "path": "pictures/a.png"},
    "checkpoint": {"step": 1, "path": "checkpoints/step-1", "stall_s": 0.1, "write_s": 1},
    "artifact": {"path": "model"},
    "notice": {"message": "café 🙂"},
    "end": {"step": 1, "status": "finished", "reason": ""},
}
ODD: list[Any] = [
    None,
    "odd",
    "\ud800",
    -1,
    1.5,
    True,
    10**400,
    1e400,
    [],
    [1],
    {},
    {"x": None},
    {"x": {}},
]


def test_the_decoder_takes_what_is_written_and_refuses_the_rest_in_words() -> None:
    for kind, fields in GOOD.items():
        line = {"time": 1.0, "kind": kind, **fields}
        assert decode(json.dumps(line).encode())["kind"] == kind
        for name in line:
            for odd in ODD:
                # Nothing but BadLine: neither another error nor what could not be printed.
                with suppress(BadLine):
                    got = decode(json.dumps({**line, name: odd}).encode())
                    json.dumps(got, ensure_ascii=False).encode()
    for name in ("time", "kind", "step", "metrics"):
        lacking = {"time": 1.0, "kind": "step", **GOOD["step"]}
        del lacking[name]
        with pytest.raises(BadLine, match=f"{name} is missing"):
            decode(json.dumps(lacking).encode())
    for line, name in (
        ({"kind": "step", "step": "7", "metrics": {}}, "step"),
        ({"kind": "end", "step": 7, "reason": ""}, "status"),
        ({"kind": "epoch", "step": 7, "epoch": 1, "metrics": {"val/kl": 1}}, "metrics"),
        ({"kind": "artifact", "path": "../../other"}, "path"),
        ({"kind": "picture", "step": 1, "key": "x", "path": "/etc/passwd"}, "path"),
    ):
        with pytest.raises(BadLine, match=name):
            decode(json.dumps({"time": 1.0, **line}).encode())


@pytest.mark.parametrize(
    "damage",
    [
        b"\0\0\0\xff",
        b"[1]",
        b'{"step": 1}',
        b'{"time":1,"kind":"step","step":1,"metrics":{"a":null}}',
        b"7",
        b"",
        b"[" * 100_000,
        b"9" * 5_000,
        '{"time":1,"kind":"notice","message":"x"}'.encode("utf-16"),
    ],
)
def test_a_damaged_line_is_skipped_with_one_warning(
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
        path.write_bytes(path.read_bytes() + damage + b"\n")
        assert read(path, size)[1] == path.stat().st_size
    assert caplog.text.count("is skipped") == 1
    assert f"{path}: line 2 is skipped" in caplog.text
    assert len(caplog.records[0].getMessage()) < len(str(path)) + 300
    assert [record["step"] for record in read(path)[0]] == [1, 2]
    assert read_outline(path)[-1]["step"] == 2


def random_journal(draw: random.Random) -> list[Line]:
    kinds = ["start", "end", "preflight", "step", "system", "epoch", "evaluation", "notice"]
    now, lines = 1e9, list[Line]()
    for kind in draw.choices(kinds, [2, 1, 1, 6, 2, 1, 1, 1], k=draw.randrange(60)):
        now += draw.choice([0.0, 0.25, 1.0, 3600.0])
        lines.append({"time": now, "kind": kind, **GOOD[kind], "step": len(lines)})
    return lines


def test_training_time_is_that_between_a_start_and_its_last_word(tmp_path: Path) -> None:
    path, draw = tmp_path / "journal.jsonl", random.Random(7)
    for _ in range(200):
        lines = random_journal(draw)
        # Of every start: to its end, or else to the last line of its own before the next attempt.
        expected = 0.0
        for number, line in enumerate(lines):
            if line["kind"] == "start":
                stretch = [line]
                for later in lines[number + 1 :]:
                    if later["kind"] in ("start", "preflight") or stretch[-1]["kind"] == "end":
                        break
                    if later["kind"] != "evaluation":
                        stretch.append(later)
                expected += stretch[-1]["time"] - line["time"]
        assert training_seconds(lines) == pytest.approx(expected)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        path.write_text(text)
        outline = read_outline(path)
        assert training_seconds(outline) == pytest.approx(expected)
        others = [line for line in lines if line["kind"] not in ("step", "system")]
        assert [one for one in outline if one["kind"] not in ("step", "system")] == [
            decode(json.dumps(one).encode()) for one in others
        ]
        for kind in ("step", "system"):
            steps = [line["step"] for line in lines if line["kind"] == kind]
            kept = [line["step"] for line in outline if line["kind"] == kind]
            assert kept[-1:] == steps[-1:]


def test_an_outline_is_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, draw = tmp_path / "journal.jsonl", random.Random(8)
    offsets: list[int] = []

    def noted(path: Path, offset: int, until: int | None = None) -> Sequence[bytes]:
        offsets.append(offset)
        return whole_lines(path, offset, until)

    def anew() -> list[Line]:
        with monkeypatch.context() as forgetful:
            forgetful.setattr(journal, "_outlines", {})
            return read_outline(path)

    whole_lines = journal._whole_lines
    monkeypatch.setattr(journal, "_whole_lines", noted)
    for number in range(40):
        lines = random_journal(draw)
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        # Replaced: written anew in place, or by another file under its name.
        new = path if number % 2 else tmp_path / "new"
        new.write_bytes(b"")
        new.rename(path)
        assert read_outline(path) == []
        # A writer may be seen in the middle of a line.
        ends = [0, *sorted(draw.choices(range(len(text) + 1), k=4)), len(text)]
        for begin, end in pairwise(ends):
            with path.open("ab") as file:
                file.write(text[begin:end])
            offsets.clear()
            assert str(read_outline(path)) == str(read_outline(path))  # NaN is not NaN
            assert offsets[0] == text.rfind(b"\n", 0, begin) + 1
            assert offsets[1] == text.rfind(b"\n", 0, end) + 1
            assert str(read_outline(path)) == str(anew())
        os.truncate(path, draw.randrange(len(text) + 1))
        assert str(read_outline(path)) == str(anew())


def test_a_pause_and_the_next_preflight_are_no_training() -> None:
    times = {"start": (0, 1e6, 2e6), "end": (30, 2e6 + 1), "preflight": (1e6 - 5, 2e6 - 5)}
    lines = [{"kind": kind, "time": when} for kind, whens in times.items() for when in whens]
    lines += [{"kind": "step", "time": 1e6 + 3}, {"kind": "evaluation", "time": 1.5e6}]
    assert training_seconds(sorted(lines, key=lambda line: line["time"])) == 30 + 3 + 1


@pytest.mark.parametrize("lines_before_kill", [1, 40, 300])
def test_kill_loses_no_line(tmp_path: Path, lines_before_kill: int) -> None:
    path = tmp_path / "journal.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for _ in range(lines_before_kill):
            writer.stdout.readline()
        writer.kill()
        printed = lines_before_kill + len(writer.stdout.read().splitlines())
    steps = [record["step"] for record in read(path)[0]]
    assert steps == list(range(len(steps)))
    assert len(steps) >= printed


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
