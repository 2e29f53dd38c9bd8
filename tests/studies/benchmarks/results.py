"""Writes measurements as a table in Markdown and CSV, and to MLflow."""

import os
import platform
import statistics
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from mlflow.tracking import MlflowClient

from cvae.files import paths
from cvae.files.paths import write_atomically
from cvae.tracking.mlflow_store import create_store, experiment_id

EXPERIMENT = "benchmark"
FILES = ("benchmark.md", "benchmark.csv")
COLUMNS = ["experiment", "measured", "value", "lowest", "highest", "runs", "unit"]


class Row(NamedTuple):
    experiment: str
    measured: str
    """loop/images_per_second, or loop:bare step for the ratio of the two."""
    values: list[float]
    """One per round."""
    unit: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def frame(rows: list[Row]) -> pd.DataFrame:
    """Returns a row per measurement: median, lowest and highest over the rounds."""
    cells = [
        (r.experiment, r.measured, r.median, min(r.values), max(r.values), len(r.values), r.unit)
        for r in rows
    ]
    table: pd.DataFrame = pd.DataFrame(cells, columns=COLUMNS)
    return table


def ratio(rows: list[Row], over: Row, under: Row, name: str) -> None:
    """Adds the ratio of two rows, taken round by round: a slow machine slows both."""
    values = [a / b for a, b in zip(over.values, under.values, strict=True)]
    rows.append(Row(over.experiment, name, values, "×"))


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in table.itertuples(index=False):
        cells = [_shown(cell) if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: float) -> str:
    if value >= 1e9:
        return f"{value / 1e9:,.0f} G"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def write(rows: list[Row], out: Path, machine: str, command: str) -> None:
    """Writes benchmark.md and benchmark.csv in `out`, replacing those of an earlier round."""
    table = frame(rows)
    text = f"{machine}\n\n    {command}\n\n{markdown(table)}"
    write_atomically(out / "benchmark.md", text)
    write_atomically(out / "benchmark.csv", table.to_csv(index=False))


def to_mlflow(rows: list[Row], out: Path, machine: str, command: str) -> None:
    """Adds a run to MLflow's experiment "benchmark": medians as metrics, the tables as artifacts."""
    uri = paths.tracking_uri()
    create_store(uri)
    client = MlflowClient(uri)
    tags = {"machine": machine, "command": command}
    run_id = client.create_run(
        experiment_id(client, EXPERIMENT, uri), run_name=out.name, tags=tags
    ).info.run_id
    for row in rows:
        client.log_metric(run_id, f"{row.experiment}/{row.measured}", row.median)
    for name in FILES:
        client.log_artifact(run_id, str(out / name))
    client.set_terminated(run_id)


def this_machine() -> str:
    """Returns a description of the machine, for the head of a table."""
    import torch

    if torch.cuda.is_available():
        kind = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    else:
        kind = f"CPU, {len(os.sched_getaffinity(0))} cores"
    return f"{kind}; torch {torch.__version__}, Python {platform.python_version()}"
