"""Reports of odd runs: without measurements, with odd numbers, and with strings that could be markup."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from analysis import report
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from tests.helpers.trained_runs import make_run

EVIL = '<script>alert("x")</script> $\\frac{$ {{ 7*7 }} & \x1b[31m \x00 \ud800 🦊'


def write(run: RunDirectory, *lines: tuple[str, dict[str, Any]]) -> None:
    journal = Journal(run.journal_file)
    for kind, fields in lines:
        journal.append(kind, **fields)
    journal.close()


def start(**more: Any) -> tuple[str, dict[str, Any]]:
    return "start", {"step": 0, "world_size": 1, "hosts": ["a"], "device": "cpu"} | more


def make(out: Path, *runs: str) -> str:
    assert report.main(["--runs", *runs, "--out", str(out)]) == 0
    return (out / "index.html").read_text("utf-8")


STEP = ("step", {"step": 1, "metrics": {"train/loss": 3.0}})
END = ("end", {"status": "finished", "step": 1, "reason": ""})


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [start()],
        [start(), STEP],
        [start(), STEP, END],
        [start(), END],
        [start(), ("epoch", {"step": 1, "epoch": 1.0, "metrics": {"val/kl": 2.0}}), END],
        [start(), ("epoch", {"step": 1, "epoch": 1.0, "metrics": {"val/loss": float("inf")}}), END],
        [start(), ("epoch", {"step": 0, "epoch": 0.0, "metrics": {"val/loss": 2.0}}), END],
    ],
)
def test_a_report_of_runs_that_have_measured_little(
    lines: list[tuple[str, dict[str, Any]]], tiny_captioned_store: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        write(make_run(name, captioned=True), *lines)
    for number, names in enumerate((["one"], ["one", "two"])):
        page = make(tmp_path / f"report{number}", *names)
        assert "Where it comes from" in page
        if not any("val/loss" in fields.get("metrics", {}) for _, fields in lines):
            assert "No run has been evaluated yet" in page


def test_runs_with_different_metrics(tiny_captioned_store: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two", "three")):
        metrics = {"val/loss": 5.0 + number, f"val/own{number}": 1.0}
        epoch = ("epoch", {"step": 1, "epoch": 1.0, "metrics": metrics})
        write(make_run(name, captioned=True), start(), STEP, epoch, END)
    page = make(tmp_path / "report", "one", "two", "three")
    assert all(f"val/own{number}" in page for number in range(3))


def test_no_string_of_a_run_becomes_part_of_the_page(
    tiny_captioned_store: Path, tmp_path: Path
) -> None:
    evil = EVIL.replace("\ud800", "")
    facts = dict.fromkeys(("device", "commit", "uncommitted_changes", "data_name"), evil)
    facts |= {"hosts": [evil], "packages": {evil: evil}, "data_digest": evil}
    epoch = {"step": 1, "epoch": 1.0, "metrics": {"val/loss": 5.0, f"val/{evil}": 1.0}}
    for name in ("one", "two"):
        run = make_run(name, captioned=True)
        end = {"status": "failed" if name == "two" else "finished", "step": 1, "reason": evil}
        evaluation = {
            "step": 1,
            "key": "val/x",
            "metrics": {f"eval/{evil}": 2.0, "eval/iwae_5": 9.0},
        }
        lines = (start(**facts), STEP, ("epoch", epoch), ("evaluation", evaluation), ("end", end))
        write(run, *lines)
        run.launch_file.write_text("[]")
        text = run.experiment_file.read_text()
        odd = {"one": "'$\\frac{$<script>alert(1)'", "two": "b"}[name]
        run.experiment_file.write_text(re.sub("(?m)^  val: .*", f"  val: {odd}", text))
    captions = tiny_captioned_store / "val" / "captions.json"
    captions.write_text(captions.read_text().replace("val caption 0", "<script>$\\f{"))
    page = make(tmp_path / "report", "one", "two")
    assert "<script>alert" not in page
    assert "\x00" not in page
    assert "\x1b" not in page


def test_a_folder_whose_name_is_no_text(tiny_captioned_store: Path, tmp_path: Path) -> None:
    epoch = ("epoch", {"step": 1, "epoch": 1.0, "metrics": {"val/loss": 5.0}})
    run = make_run("one", captioned=True)
    write(run, start(), STEP, epoch, END)
    odd = os.fsdecode(os.fsencode(run.path.parent) + b"/b\xffd $\\frac{$ <script>alert(1)<")
    odd = odd.replace("</", "<")
    os.rename(run.path, odd)
    page = make(tmp_path / "report", odd)
    assert "<script>alert" not in page
    assert re.search(r"b.{1,4}d ", page)
