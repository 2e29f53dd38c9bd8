"""Run folders that are damaged in many ways: the commands that look at runs go on, and say what is wrong."""

import json
import os
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest

from analysis.loading import curves
from analysis.loading import runs as table_of
from cvae.config import Experiment
from cvae.errors import UserError
from cvae.run_directory import RunDirectory
from cvae.training.journal import Journal
from slurm import files, tries
from slurm.tries import Try
from tests.conftest import tiny_experiment
from workflows import runs
from workflows.sweeps import view
from workflows.sweeps.directory import SweepDirectory, Trial

ENTRY = {"time": 1e9, "cluster": "local", "executor": "local", "job_id": "4194303", "host": "h"}
ENTRY |= {"nodes": 1, "gpus": 1, "world_size": 1, "journal_offset": 0, "command": "launch.py x"}
SWEEP = """\
name: s
experiment: configs/x.yaml
metric: val/loss
mode: min
space: {seed: {seeds: 2}}
"""
VALUES = [None, True, -1, 7, 1.5, 1e300, 10**40, "x", "", "é\ud800", [], [1], [[]], {}, {"x": {}}]
BYTES = [
    b"",
    b"\0",
    b"\xff\xfe\x00",
    b"[" * 30_000,
    b"{}",
    b"[]",
    b"null",
    b"7",
    b'"x"',
    b"[[]]",
    b"[null]",
]
BYTES += [
    b"9" * 5000,
    b"\n\n",
    b"- &a [*a]",
    b"{\xe9: 1}",
    b"NaN",
    b"[{}]",
    b"{" * 200,
    b"x: " + b"y" * 100_000,
]


def make(name: str) -> RunDirectory:
    run = RunDirectory.create(name, Experiment.model_validate(tiny_experiment()))
    run.launch_file.write_text(json.dumps([ENTRY]))
    tries.write(run.logs, ENTRY["job_id"], [Try(1, 1e9, ["n"], 1e9 + 5, "crash", "why")])  # type: ignore[arg-type]
    (run.path / "mlflow.json").write_text(json.dumps({"tracking_uri": "u", "run_dir_id": "i"}))
    journal = Journal(run.journal_file)
    host = {"free_disk": 1, "free_memory": 1, "clock_offset_s": 0}
    journal.append("preflight", seconds=1, hosts={"h": host}, all_reduce=None, warnings=[])
    journal.append("start", step=0, world_size=1, hosts=["h"], device="cpu", precision="fp32")
    for step in (1, 2):
        journal.append("step", step=step, metrics={"train/loss": 3.0})
        journal.append("epoch", step=step, epoch=step, metrics={"val/loss": 3.0, "val/kl": 1.0})
        journal.append("checkpoint", step=step, path=f"checkpoints/step-{step}", stall_s=0.1)
    journal.append("evaluation", step=2, key="k", metrics={"eval/psnr": 1.0})
    journal.append("notice", message="m")
    journal.append("end", step=2, status="failed", reason="r")
    journal.close()
    return run


@pytest.fixture
def odd(home: Path) -> RunDirectory:
    make("good")
    return make("odd")


@pytest.fixture
def sweep(odd: RunDirectory) -> SweepDirectory:
    made = SweepDirectory(odd.path.parent.parent / "sweeps" / "s")
    made.logs.mkdir(parents=True)
    made.sweep_file.write_text(SWEEP)
    made.experiment_file.write_text(odd.experiment_file.read_text())
    made.launch_file.write_text(json.dumps([{**ENTRY, "address": None, "gpus_per_trial": 1}]))
    trials = [Trial(n, str(n), name, {"seed": n}) for n, name in enumerate(("odd", "good"))]
    trials[0].status = "running"
    made.write_trials(trials)
    return made


def look(capsys: pytest.CaptureFixture[str], name: str = "odd") -> str:
    """Everything that looks at runs; UserError is one line for a person, whatever else fails the test."""
    assert runs.main(["list"]) == runs.main(["show", "good"]) == 0
    with suppress(UserError):
        assert runs.main(["show", name]) == 0
    frame = table_of("tiny", source="folders")
    assert "good" in frame.index
    assert len(curves(frame)) > 0
    shown = capsys.readouterr().out
    shown.encode()
    assert re.search("^good +failed", shown, re.MULTILINE)
    return shown


def damaged(content: bytes, draw: random.Random) -> bytes:
    def other_value(tree: object) -> object:
        if isinstance(tree, dict) and tree and draw.random() < 0.9:
            key = draw.choice(list(tree))
            if draw.random() < 0.25:
                return {name: value for name, value in tree.items() if name != key}
            return {**tree, key: other_value(tree[key])}
        if isinstance(tree, list) and tree and draw.random() < 0.9:
            place = draw.randrange(len(tree))
            return [*tree[:place], other_value(tree[place]), *tree[place + 1 :]]
        return draw.choice(VALUES)

    kind = draw.randrange(5)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        place = draw.randrange(len(content))
        return content[:place] + draw.choice(BYTES) + content[place + draw.randrange(40) :]
    if kind == 2:
        return draw.choice(BYTES)
    try:
        lines = [json.loads(line) for line in content.splitlines()]
    except ValueError:
        try:
            return json.dumps(other_value(json.loads(content))).encode()
        except ValueError:
            words = content.decode().split("\n")
            words[draw.randrange(len(words))] += draw.choice(
                [": {", "- x", " !!int ''", ": 7", "\t"]
            )
            return "\n".join(words).encode()
    for _ in range(3):
        place = draw.randrange(len(lines))
        lines[place] = other_value(lines[place])
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


@pytest.mark.parametrize(
    "name", ["launch.json", "mlflow.json", "journal.jsonl", "experiment.yaml", "tries"]
)
def test_no_content_of_a_file_is_a_traceback(
    odd: RunDirectory, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = files.tries_file(odd.logs, ENTRY["job_id"]) if name == "tries" else odd.path / name  # type: ignore[arg-type]
    draw, content = random.Random(name), file.read_bytes()
    for _ in range(int(os.environ.get("FUZZ_CASES", "20"))):
        file.write_bytes(damaged(content, draw))
        look(capsys)


@pytest.mark.parametrize("name", ["trials.json", "launch.json"])
def test_no_content_of_a_sweep_is_a_traceback(sweep: SweepDirectory, name: str) -> None:
    file = sweep.path / name
    draw, content = random.Random(name), file.read_bytes()
    for _ in range(int(os.environ.get("FUZZ_CASES", "20"))):
        file.write_bytes(damaged(content, draw))
        with suppress(UserError):
            trials = sweep.trials()
            view.table(sweep.sweep(), trials)
            if sweep.submissions():
                view.ending(sweep, trials, view.queue.look(sweep.submissions()[-1]))


def test_odd_folders_have_a_row_that_says_why(
    odd: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = odd.path.parent
    os.rename(odd.path, folder / os.fsdecode(b"n\xff\xfe"))
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "a\nb").mkdir()
    (folder / "a\nb" / "experiment.yaml").write_text("name: [")
    journal_is_folder, other = make("folder"), make("never")
    journal_is_folder.journal_file.unlink()
    journal_is_folder.journal_file.mkdir()
    other.launch_file.unlink()
    (folder / "no-run").mkdir()
    (folder / "file").write_text("")
    shown = look(capsys, "folder")
    for name in (r"n\xff\xfe", "gone", "loop", r"a\nb", "folder"):
        assert re.search(rf"^{re.escape(name)}  unreadable: ", shown, re.MULTILINE), name
    assert re.search("^never +failed", shown, re.MULTILINE)
    assert "no-run" not in shown
    assert "file  " not in shown
    other.journal_file.unlink()
    assert "status      died: it was never submitted" in look(capsys, "never")
