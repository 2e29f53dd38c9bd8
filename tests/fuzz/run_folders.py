"""Run folders, and sweeps, of which a file was damaged: beside them every other run is still there."""

import json
import math
import os
import random
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.run import checkpoint
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from slurm import attempts, job_state
from slurm.attempts import Attempt, AttemptEnd, Cause
from tests.conftest import tiny_experiment, write_store
from tests.fuzz import damage
from tests.fuzz.frame import Case, command, target
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
_SWEEP_FILES = [
    f"sweeps/s/{name}"
    for name in ("sweep.yaml", "experiment.yaml", "launch.json", "trials.json", "trials.json")
]
# Imports and training take seconds on a busy machine.
_SECONDS = 60.0
_LOSS = 3.25


def make(name: str) -> RunDirectory:
    """A run that has told all that a run tells, and failed."""
    run = RunDirectory.create(name, Experiment.model_validate(tiny_experiment()))
    run.launch_file.write_text(json.dumps([ENTRY]))
    crash = AttemptEnd(Cause.CRASH, "n", rank=0, message="why")
    attempts.write(run.logs, str(ENTRY["job_id"]), [Attempt(1, 1e9, ["n"], 1e9 + 5, crash)])
    (run.path / "mlflow.json").write_text(json.dumps({"tracking_uri": "u", "run_dir_id": "i"}))
    host = {"free_disk": 1, "free_memory": 1, "clock_offset_s": 0}
    with closing(Journal(run.journal_file)) as journal:
        journal.append("preflight", seconds=1, hosts={"h": host}, all_reduce=None, warnings=[])
        journal.append("start", step=0, world_size=1, hosts=["h"], device="cpu", precision="fp32")
        for step in (1, 2):
            journal.append("step", step=step, metrics={"train/loss": 3.0})
            metrics = {"val/loss": _LOSS, "val/kl": 1.0}
            journal.append("epoch", step=step, epoch=step, metrics=metrics)
            journal.append("checkpoint", step=step, path=f"checkpoints/step-{step}", stall_s=0.1)
        journal.append("evaluation", step=2, key="k", metrics={"eval/psnr": 1.0})
        journal.append("notice", message="m")
        journal.append("end", step=2, status="failed", reason="r")
    return run


def make_sweep(home: Path, *runs: RunDirectory) -> SweepDirectory:
    """A sweep whose trials these runs are."""
    made = SweepDirectory(home / "sweeps" / "s")
    made.logs.mkdir(parents=True)
    made.sweep_file.write_text(SWEEP)
    made.experiment_file.write_text(runs[0].experiment_file.read_text())
    made.launch_file.write_text(json.dumps([{**ENTRY, "address": None, "gpus_per_trial": 1}]))
    trials = [Trial(n, str(n), run.name, {"seed": n}) for n, run in enumerate(runs)]
    trials[0].status = "running"
    made.write_trials(trials)
    return made


@cache
def _original() -> tuple["tempfile.TemporaryDirectory[str]", Path]:
    """A home of the runs good, odd and other, with two checkpoints each, and a sweep of all three."""
    import torch

    from cvae.data.experiment_data import open_data
    from cvae.models.cvae import build_model

    kept = tempfile.TemporaryDirectory(prefix="fuzz-")
    home = Path(kept.name)
    with mock.patch.dict(os.environ, {"CVAE_HOME": str(home)}):
        write_store(home, captioned=False, sizes=(10, 3))
        runs = [make(name) for name in ("odd", "good", "other")]
        experiment = runs[0].experiment()
        data = open_data(experiment)
        for run in runs:
            for step in (1, 2):
                model = build_model(experiment.model, data.image_shape, data.condition_dim, step)
                weights = model.state_dict()
                adam = {f"{key}.{name}": torch.zeros_like(value) for name, value in weights.items()
                        for key in ("exp_avg", "exp_avg_sq")}  # fmt: skip
                adam |= {f"step.{name}": torch.tensor(float(step)) for name in weights}
                state = {"step": step, "best_val_loss": _LOSS, "loss_scale": None, "skipped": 0}
                tensors = {"model": weights, "optimizer": adam}
                checkpoint.save(
                    run.checkpoints, checkpoint.TrainingState(tensors, state), 2, best=True
                )
        make_sweep(home, *runs)
    return kept, home


def _files(run: str) -> list[str]:
    """What a run's commands and its trainer read, by its path in the home."""
    plain = ["experiment.yaml", "launch.json", "mlflow.json", "journal.jsonl", "journal.jsonl"]
    saved = [f"checkpoints/{step}/{name}" for step in ("step-00000001", "step-00000002")
             for name in ("model.safetensors", "optimizer.safetensors", "state.json")]  # fmt: skip
    told = [str(file.relative_to(_original()[1] / "runs" / run))
            for file in (_original()[1] / "runs" / run / "logs").rglob("*") if file.is_file()]  # fmt: skip
    return [f"runs/{run}/{name}" for name in (*plain, *saved, *told, "checkpoints/best")]


@target("runs", seconds=_SECONDS)
def runs(draw: random.Random, folder: Path) -> Case:
    damage.copy(_original()[1], folder)
    files = [*_files("odd"), *_SWEEP_FILES]
    done = [damage.damage_a_file(draw, folder, files) for _ in range(draw.choice([1, 1, 2, 4]))]
    trains = draw.random() < 0.1
    odd = folder / "runs" / "odd"

    def read() -> None:
        with _at_home(folder), damage.untouched(folder / "runs", folder / "sweeps"):
            look("odd", folder)
            _check_checkpoints(odd)
        with _at_home(folder), damage.untouched(folder / "runs"):
            _look_at_sweep(SweepDirectory(folder / "sweeps" / "s"))
        if trains:
            with _at_home(folder), damage.untouched(folder / "runs" / "good"):
                _resume(odd)

    return Case(f"{done} trains: {trains}", read)


def look(name: str, home: Path) -> tuple[str, str]:
    """Returns what `runs.py list` and `runs.py show` say of a damaged run; the good one must be seen beside it."""
    from analysis.tables import curves
    from analysis.tables import runs as table_of
    from workflows import runs

    listed = command(runs.main, ["list"]).out
    assert re.search(rf"^good +failed +2.* {_LOSS}", listed, re.MULTILINE), (
        f"no good run in {listed[-500:]}"
    )
    assert (
        re.search(rf"^{name}  ?\S?", listed, re.MULTILINE)
        or not (home / "runs" / name / "experiment.yaml").is_file()
    ), f"{name} is not listed: {listed[-500:]}"
    assert re.search("^status +failed", command(runs.main, ["show", "good"]).out, re.MULTILINE)
    shown = command(runs.main, ["show", name], name)
    (listed + shown.out).encode()
    frame = table_of("tiny", source="folders")
    assert frame.loc["good", "val/loss"] == _LOSS, "another loss of the good run"
    points = curves(frame)
    assert len(points[points["run"] == "good"]) > 0, "no points of the good run"
    return listed, shown.out


def _look_at_sweep(sweep: SweepDirectory) -> None:
    from workflows.sweeps import live_view

    with suppress(UserError, OSError):
        trials = sweep.trials()
        live_view.table(sweep.sweep(), trials)
        if submissions := sweep.submissions():
            live_view.ending(sweep, trials, job_state.look(submissions[-1]))


def _check_checkpoints(run: Path) -> None:
    """What is loaded is what was saved at its step, or nothing."""
    folder = run / "checkpoints"
    with suppress(UserError):
        newest = checkpoint.load_newest(folder, print)
        if newest is not None:
            _check_same(newest.tensors, newest.state["step"])
    with suppress(UserError):
        weights, step = checkpoint.load_weights(folder, print)
        _check_same({"model": weights}, step)


def _check_same(found: dict[str, dict[str, Any]], step: int) -> None:
    saved = checkpoint.load_step(_original()[1] / "runs" / "odd" / "checkpoints", step).tensors
    for part, tensors in found.items():
        assert tensors.keys() == saved[part].keys(), f"other names in {part}"
        same = all(bool((tensors[name] == saved[part][name]).all()) for name in tensors)
        assert same, f"another {part} than was saved at step {step}"


def _resume(run: Path) -> None:
    """Does in this process what `runs.py resume` has a job do; it refuses in one line or trains to the end."""
    from cvae.training.train import train
    from workflows.jobs.run_state import run_state

    def main(words: list[str]) -> int:
        run_state(RunDirectory(run))
        return int(train(run, mirrored=False).status != "finished")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        command(main, [], run.name)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _at_home(home: Path) -> Iterator[None]:
    with mock.patch.dict(
        os.environ, {"CVAE_HOME": str(home), "MLFLOW_TRACKING_URI": f"sqlite:///{home}/none.db"}
    ):
        yield


@target("reports", seconds=_SECONDS)
def reports(draw: random.Random, folder: Path) -> Case:
    damage.copy(_original()[1], folder)
    files = [*_files("odd"), *_files("other"), *_SWEEP_FILES]
    done = [damage.damage_a_file(draw, folder, files) for _ in range(draw.choice([1, 2, 3, 5]))]
    which = draw.choice(
        [["--experiment", "tiny"], ["--sweep", "s"], ["--runs", "good", "odd", "other"]]
    )
    drawn = draw.random() < 0.05

    def read() -> None:
        from analysis import report

        out = folder / "report"
        kept = (folder / "runs", folder / "sweeps", folder / "data")
        with _at_home(folder), damage.untouched(*kept), _quick_figures(drawn):
            outcome = command(
                report.main,
                [*which, "--out", str(out)],
                "sweep s",
                "trials.json",
                "s:",
                "s/",
                "odd",
                "other",
            )
        if outcome.refusal:
            assert not out.exists(), "half a report"
            assert which[0] != "--experiment", f"no report of the good run: {outcome.refusal}"
            raise UserError(outcome.refusal)
        _check_report(out, must="--sweep" not in which)

    return Case(f"{done} {which} drawn: {drawn}", read)


def _check_report(out: Path, must: bool) -> None:
    """The good run is in the report with its numbers; must: even if a sweep's list of trials may not name it."""
    import pandas as pd

    assert "</html>" in (out / "index.html").read_text("utf-8"), "a page without end"
    tables = [pd.read_csv(file) for file in sorted((out / "tables").glob("*.csv"))]
    rows = [table[table["run"] == "good"] for table in tables if "run" in table]
    assert any(len(row) for row in rows) or not must, "the good run is not in the report"
    losses = [row["val/loss"].iloc[0] for row in rows if len(row) and "val/loss" in row]
    assert all(math.isclose(loss, _LOSS) for loss in losses), (
        f"another loss of the good run: {losses}"
    )


@contextmanager
def _quick_figures(drawn: bool) -> Iterator[None]:
    """drawn: figures are really drawn, which takes seconds."""
    if drawn:
        yield
        return
    from matplotlib.figure import Figure
    from PIL import Image

    def save(self: Figure, file: object, format: str, **options: object) -> None:
        if format == "svg":
            file.write("<svg></svg>")  # type: ignore[attr-defined]
        else:
            Image.new("RGB", (1, 1)).save(file, "PNG")  # type: ignore[arg-type]

    with mock.patch.object(Figure, "savefig", save):
        yield
