"""Measures how fast analysis.runs() and analysis.curves() load many runs: cold, from the cache, from MLflow.

Writes run folders whose journals have many points, and then the same points as MLflow's database, in a temporary
home, and prints the seconds.
"""

import argparse
import json
import os
import resource
import shutil
import sqlite3
import tempfile
import time
import uuid
from pathlib import Path

import analysis
from cvae.config.experiment import Experiment
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.tracking import mlflow_mirror
from tests.conftest import tiny_experiment


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.studies.loading_speed", description=__doc__
    )
    parser.add_argument("runs", nargs="?", type=int, default=1000)
    parser.add_argument("steps", nargs="?", type=int, default=10_000)
    return parser


def main(n_runs: int, n_steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        os.environ["CVAE_HOME"] = folder
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        begun = time.monotonic()
        first = write_runs(n_runs, n_steps)
        size = sum(file.stat().st_size for file in home.glob("runs/*/journal.jsonl"))
        print(f"{n_runs:,} runs × {n_steps:,} points, {size / 1e9:.2f} GB of journals,", end=" ")
        print(f"written in {time.monotonic() - begun:.0f} s", flush=True)
        measure("folders", "folders, cold")
        measure("folders", "folders, from the cache")
        fill_mlflow(first, home, n_runs, n_steps)
        for run in (home / "runs").iterdir():
            shutil.rmtree(run)
        measure("mlflow", "MLflow's database")
        print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


def measure(source: analysis.tables.Source, label: str) -> None:
    begun = time.monotonic()
    table = analysis.runs("tiny", source=source)
    middle = time.monotonic()
    points = analysis.curves(table, ["train/loss"])
    now = time.monotonic()
    print(
        f"{label}: {len(table):,} runs in {middle - begun:.1f} s, {len(points):,} points in",
        end=" ",
    )
    print(f"{now - middle:.1f} s, together {now - begun:.1f} s", flush=True)


def write_runs(n_runs: int, n_steps: int) -> RunDirectory:
    experiment = Experiment.model_validate(tiny_experiment())
    lines = [
        json.dumps({"time": 1e9 + n, "kind": "step", "step": n, "metrics": {"train/loss": 100 / n}})
        for n in range(1, n_steps + 1)
    ]
    block = ("\n".join(line.replace(" ", "") for line in lines) + "\n").encode()
    for number in range(n_runs):
        run = RunDirectory.create(f"run{number:05}", experiment)
        journal = Journal(run.journal_file)
        journal.append("start", step=0, world_size=1, hosts=["a"], device="cpu")
        journal.append("epoch", step=1, epoch=1.0, metrics={"val/loss": 1.0 + number})
        journal.close()
        with open(run.journal_file, "ab") as file:
            file.write(block)
        if number == 0:
            first = run
    return first


def fill_mlflow(first: RunDirectory, home: Path, n_runs: int, n_steps: int) -> None:
    """Writes one run as the mirror does, and copies its rows for each of the others."""
    text = first.journal_file.read_text().splitlines(keepends=True)
    first.journal_file.write_text("".join(text[:2]))
    mlflow_mirror.sync(first.path, lambda lines: None)
    with sqlite3.connect(home / "mlflow.db") as db:
        (run_id,) = db.execute("select run_uuid from runs").fetchone()
        for table in ("params", "tags", "latest_metrics"):
            names = [row[1] for row in db.execute(f"pragma table_info({table})")]
            rows = db.execute(f"select * from {table}").fetchall()
            place, marks = names.index("run_uuid"), ", ".join("?" * len(names))
            for number in range(1, n_runs):
                copies = [[*row[:place], ident(number), *row[place + 1 :]] for row in rows]
                db.executemany(f"insert into {table} values ({marks})", copies)
        names = [row[1] for row in db.execute("pragma table_info(runs)")]
        row = db.execute("select * from runs").fetchone()
        for number in range(1, n_runs):
            changed = {"run_uuid": ident(number), "name": f"run{number:05}"}
            copy = [changed.get(name, value) for name, value in zip(names, row, strict=True)]
            db.execute(f"insert into runs values ({', '.join('?' * len(copy))})", copy)
        insert = "insert into metrics (key, value, timestamp, run_uuid, step, is_nan) values (?,?,?,?,?,?)"
        for number in range(n_runs):
            owner = run_id if number == 0 else ident(number)
            points = [
                ("train/loss", 100 / n, 10**12 + n, owner, n, False) for n in range(1, n_steps + 1)
            ]
            db.executemany(insert, points)


def ident(number: int) -> str:
    return uuid.UUID(int=number).hex


if __name__ == "__main__":
    options = parser().parse_args()
    main(options.runs, options.steps)
