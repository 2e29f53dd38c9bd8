"""Run folders as tables: what experiment.yaml, launch.json and the journal say, read at the speed of the disk."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import yaml

from cvae import yaml_model
from cvae.run_directory import RunDirectory
from cvae.training import journal

_POINTS = (b'"kind":"step"', b'"kind":"system"')
_WITH_METRICS = ("step", "epoch", "system", "evaluation")
_FACTS = (
    "world_size",
    "device",
    "commit",
    "uncommitted_changes",
    "packages",
    "data_name",
    "data_digest",
)
SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("step", pa.int64()),
        ("epoch", pa.float64()),
        ("time", pa.float64()),
        ("value", pa.float64()),
    ]
)


def facts(run: RunDirectory) -> dict[str, Any]:
    """A run's row of analysis.runs. A file that is missing or damaged leaves its columns out."""
    row: dict[str, Any] = {"path": str(run.path), "source": "folder"} | config(run.experiment_file)
    try:
        launches = run.submissions()
    except (OSError, ValueError):
        launches = []
    row["command"] = f"python {launches[0].get('command')}" if launches else None
    try:
        block = run.journal_file.read_bytes()
    except OSError:
        block = b""
    lines = block[: block.rfind(b"\n") + 1].split(b"\n")[:-1]
    # Thousands of points stay unread: only the last of them counts here.
    marks = [n for n, line in enumerate(lines) if not any(kind in line for kind in _POINTS)]
    told = [(n, line) for n in marks if (line := _decoded(lines[n])) is not None]
    row |= _course(lines, told) | _measured(told)
    epochs = [line for _, line in told if line["kind"] == "epoch" and line["epoch"] > 0]
    if epochs and "training.global_batch_size" in row:
        # By definition of the epoch that is written with a step.
        seen = epochs[-1]["step"] * row["training.global_batch_size"]
        row["train_images"] = round(seen / epochs[-1]["epoch"])
    return row


def config(file: Path) -> dict[str, Any]:
    """Every leaf of an experiment.yaml by its dotted key; lists as text."""
    try:
        tree = yaml.load(file.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, yaml.YAMLError):
        return {}
    leaves = yaml_model.flatten(tree) if isinstance(tree, dict) else {}
    plain = {key: str(value) if isinstance(value, list) else value for key, value in leaves.items()}
    plain["experiment"] = plain.pop("name", None)
    return plain


def points(file: Path) -> pa.Table:
    """Every point of a journal, as SCHEMA."""
    block = file.read_bytes() if file.exists() else b""
    block = block[: block.rfind(b"\n") + 1]
    if not block:
        return SCHEMA.empty_table()
    try:
        options = pa_json.ReadOptions(use_threads=False, block_size=max(1 << 20, 2 * len(block)))
        return _tidy(pa_json.read_json(pa.BufferReader(block), options))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        # A damaged line, or a metric that was once not a number, which JSON writes as text.
        return _tidied_slowly(file)


def _tidy(table: pa.Table) -> pa.Table:
    if "metrics" not in table.column_names:
        return SCHEMA.empty_table()
    table = table.filter(pc.is_in(table["kind"], pa.array(_WITH_METRICS)))
    epochs = table["epoch"] if "epoch" in table.column_names else pa.nulls(len(table), pa.float64())
    metrics = table["metrics"].combine_chunks()
    parts = []
    for n, field in enumerate(metrics.type):
        if not pa.types.is_floating(field.type) and not pa.types.is_integer(field.type):
            raise pa.ArrowInvalid(f"{field.name} is text somewhere")
        values = pc.struct_field(metrics, [n])
        there = pc.is_valid(values)
        columns = [table["step"], epochs, table["time"], values]
        columns = [pc.filter(column, there) for column in columns]
        names = pa.array([field.name] * len(columns[0]), pa.string())
        arrays = [
            names,
            *(c.cast(f.type) for c, f in zip(columns, list(SCHEMA)[1:], strict=True)),
        ]
        parts.append(pa.Table.from_arrays(arrays, schema=SCHEMA))
    return pa.concat_tables(parts) if parts else SCHEMA.empty_table()


def _tidied_slowly(file: Path) -> pa.Table:
    rows = [
        (name, line["step"], line.get("epoch"), line["time"], value)
        for line in journal.read(file)[0]
        if line["kind"] in _WITH_METRICS
        for name, value in line["metrics"].items()
    ]
    # By metric, as the fast way has them.
    rows.sort(key=lambda row: row[0])
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _course(lines: Sequence[bytes], told: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """How the run went: its state, its times, how far it is, on what it ran."""
    starts = [(n, line) for n, line in told if line["kind"] == "start"]
    ends = [line for _, line in told if line["kind"] == "end"]
    if not starts:
        reason = ends[-1].get("reason") if ends else "it has not begun"
        return {"status": ends[-1].get("status") if ends else "unfinished", "reason": reason}
    first, last = starts[0][1], starts[-1][1]
    began = {n for n, _ in starts}
    # From each start to the last that was heard before the next: queues and pauses do not count.
    heard = [n - 1 for n in sorted(began)[1:]] + [len(lines) - 1]
    seconds = sum(
        max(0.0, _time(lines[until], line["time"]) - line["time"])
        for (_, line), until in zip(starts, heard, strict=True)
    )
    ended = bool(ends) and ends[-1]["time"] >= last["time"]
    newest = _last_point(lines)
    hosts = set(last.get("hosts", []))
    row = {name: last.get(name) for name in _FACTS}
    gpu = row["device"] not in (None, "cpu")
    rank_hours = seconds * (row["world_size"] or 1) / 3600
    epochs = [line["epoch"] for _, line in told if line["kind"] == "epoch"]
    epoch = max(epochs, default=math.nan)
    return row | {
        "status": ends[-1]["status"] if ended else "unfinished",
        "reason": (ends[-1].get("reason") or None) if ended else None,
        "created": pd.Timestamp(first["time"], unit="s", tz="UTC"),
        "seconds": seconds,
        "hosts": len(hosts) or None,
        "rank_hours": rank_hours,
        "gpu_hours": rank_hours if gpu else math.nan,
        "epoch": epoch,
        "seconds_per_epoch": seconds / epoch if epoch > 0 else math.nan,
        "step": newest.get("step"),
        "train/loss": newest.get("metrics", {}).get("train/loss", math.nan),
    }


def _measured(told: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """val/* of the best epoch; eval/* of the newest checkpoint that each was measured at."""
    epochs = [line for _, line in told if line["kind"] == "epoch" and "val/loss" in line["metrics"]]
    finite = [line for line in epochs if math.isfinite(line["metrics"]["val/loss"])]
    row: dict[str, Any] = {}
    if epochs:
        # Of a run without a finite loss the last says so.
        best = min(finite, key=lambda line: line["metrics"]["val/loss"]) if finite else epochs[-1]
        row |= {"best_step": best["step"]} | best["metrics"]
    for _, line in sorted(told, key=lambda item: item[1].get("step") or 0):
        if line["kind"] == "evaluation":
            row |= line["metrics"]
    return row


def _last_point(lines: Sequence[bytes]) -> dict[str, Any]:
    for line in reversed(lines):
        if _POINTS[0] in line:
            return _decoded(line) or {}
    return {}


def _time(line: bytes, otherwise: float) -> float:
    decoded = _decoded(line)
    return float(decoded["time"]) if decoded is not None else otherwise


def _decoded(line: bytes) -> dict[str, Any] | None:
    """None for a damaged line."""
    try:
        record: dict[str, Any] = json.loads(line)
        record["kind"], record["time"]
        for name, value in record.get("metrics", {}).items():
            record["metrics"][name] = float(value)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record
