"""Time to save, against the notice that SLURM gives."""

from pathlib import Path

import pytest

from cvae.run.journal import Journal
from slurm.cluster_file import ClusterConfig, Place
from slurm.commands import Slurm
from workflows.jobs.checkpoint_notice import grace_fact, measured_save_s


def place(monkeypatch: pytest.MonkeyPatch, mode: str, notice_s: int, grace_s: int) -> Place:
    monkeypatch.setattr(Slurm, "preemption", lambda self, partition: (mode, notice_s))
    return Place("site", ClusterConfig(executor="slurm", grace_s=grace_s), "asked for")


@pytest.mark.parametrize(
    ("mode", "notice_s", "grace_s", "save_s", "warned"),
    [
        ("REQUEUE", 30, 120, 10.0, None),
        ("REQUEUE", 30, 120, 40.0, "too short at a preemption (PreemptMode=REQUEUE):"),
        ("OFF", 0, 120, 40.0, None),
        ("OFF", 0, 30, 40.0, "too short before the time limit (grace_s = 30):"),
    ],
)
def test_a_notice_that_is_too_short_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    notice_s: int,
    grace_s: int,
    save_s: float,
    warned: str | None,
) -> None:
    _, text = grace_fact(place(monkeypatch, mode, notice_s, grace_s), save_s, "expected")
    assert ("WARNING" in text) == (warned is not None)
    assert warned is None or warned in text


def test_what_was_measured_is_the_slowest_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    assert measured_save_s(file) is None
    journal = Journal(file)
    for write_s in (1.0, 3.0, 2.0):
        journal.append("checkpoint", step=1, path="p", best=False, stall_s=0.5, write_s=write_s)
    journal.close()
    assert measured_save_s(file) == pytest.approx(3.5)
