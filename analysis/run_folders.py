"""Reads run folders (experiment.yaml, launch.json, journal) as rows and as tables of points."""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
from pydantic import BaseModel

from cvae.config import yaml_model, yaml_reader
from cvae.config.experiment import Experiment
from cvae.errors import UserError
from cvae.files.paths import printable
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.run.journal_lines import Line

_WITH_METRICS = ("step", "epoch", "system", "evaluation")
_FACTS = (
    "world_size", "device", "commit", "uncommitted_changes", "packages", "data_name", "data_digest",
)  # fmt: skip
_FLOATS = dict.fromkeys(("epoch", "time", "value"), pa.float64())
SCHEMA = pa.schema({"metric": pa.string(), "step": pa.int64()} | _FLOATS)
"""The columns of a table of points."""


def facts(run: RunDirectory) -> dict[str, Any]:
    """Returns a run's row of analysis.runs, without the columns of files that are missing or damaged."""
    row: dict[str, Any] = {"path": printable(str(run.path)), "source": "folder"}
    row |= config(run.experiment_file)
    launches, lines, unreadable = [], list[Line](), {}
    try:
        launches = run.submissions()
        lines = journal.read_outline(run.journal_file)
    except (UserError, OSError) as error:
        reason = f"unreadable: {printable(str(error))[:200]}"
        unreadable = {"status": "unfinished", "reason": reason}
    row["command"] = f"python {launches[0].get('command')}" if launches else None
    row |= _course(lines) | _measured(lines) | unreadable
    epochs = [line for line in lines if line["kind"] == "epoch" and line["epoch"] > 0]
    batch_size = row.get("training.global_batch_size")
    if epochs and isinstance(batch_size, int):
        # An epoch is defined as this many images; the journal has it with the step.
        row["train_images"] = round(epochs[-1]["step"] * batch_size / epochs[-1]["epoch"])
    return row


def config(file: Path) -> dict[str, Any]:
    """Returns every leaf of an experiment.yaml by its dotted key; lists as text."""
    try:
        tree, _ = yaml_reader.parse(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    leaves = yaml_model.flatten(tree) if isinstance(tree, dict) else {}
    return with_defaults({key: str(v) if isinstance(v, list) else v for key, v in leaves.items()})


def with_defaults(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of an experiment, its name as "experiment".

    An experiment of an older version does not name all keys: it ran with their defaults.
    """
    row = _defaults() | leaves if "model.backbone" in leaves else leaves
    return {key: value for key, value in row.items() if key != "name"} | {
        "experiment": row.get("name")
    }


@lru_cache
def _defaults(block: type[BaseModel] = Experiment, prefix: str = "") -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for name, field in block.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            defaults |= _defaults(inner, f"{prefix}{name}.")
        elif not field.is_required():
            value = field.get_default(call_default_factory=True)
            defaults[prefix + name] = str(list(value)) if isinstance(value, tuple) else value
    return defaults


def points(file: Path) -> pa.Table:
    """Returns every point of a journal, as SCHEMA, sorted by metric."""
    try:
        content = file.read_bytes()
    except OSError:
        return SCHEMA.empty_table()
    whole_lines = content[: content.rfind(b"\n") + 1].split(b"\n")
    lines = [line for line in whole_lines if b'"metrics"' in line]
    if not lines:
        return SCHEMA.empty_table()
    # Arrow's parser would crash the process on brackets that are nested ten thousand deep.
    if any(b"[" in line or line.count(b"{") != 2 for line in lines):
        return _points_by_line(file)
    block = b"\n".join([*lines, b""])
    try:
        options = pa_json.ReadOptions(use_threads=False, block_size=max(1 << 20, 2 * len(block)))
        return _points_by_column(pa_json.read_json(pa.BufferReader(block), options))
    except (pa.ArrowException, TypeError, ValueError, LookupError, AttributeError):
        # A damaged line, or a metric that was not a number once, which JSON writes as text.
        return _points_by_line(file)


def _points_by_column(table: pa.Table) -> pa.Table:
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
        columns = [table["step"], epochs, table["time"], values]
        columns = [pc.filter(column, pc.is_valid(values)) for column in columns]
        columns.insert(0, pa.array([field.name] * len(columns[0])))
        arrays = [c.cast(f.type) for c, f in zip(columns, SCHEMA, strict=True)]
        parts.append(pa.Table.from_arrays(arrays, schema=SCHEMA))
    return pa.concat_tables(parts) if parts else SCHEMA.empty_table()


def _points_by_line(file: Path) -> pa.Table:
    rows = [
        {"metric": name, "step": line["step"], "time": line["time"], "value": value}
        | ({"epoch": line["epoch"]} if line["kind"] == "epoch" else {})
        for line in journal.read(file)[0]
        if line["kind"] in _WITH_METRICS
        for name, value in line["metrics"].items()
    ]
    return pa.Table.from_pylist(sorted(rows, key=lambda row: row["metric"]), SCHEMA)


def _course(lines: Sequence[Line]) -> dict[str, Any]:
    """Returns how the run went: its state, its times, how far it is, on what it ran."""
    starts = [line for line in lines if line["kind"] == "start"]
    ends = [line for line in lines if line["kind"] == "end"]
    if not starts:
        end = ends[-1] if ends else {"status": "unfinished", "reason": "it has not begun"}
        return {"status": end.get("status"), "reason": end.get("reason")}
    first, last = starts[0], starts[-1]
    seconds = journal.training_seconds(lines)
    ended = bool(ends) and ends[-1]["time"] >= last["time"]
    newest = next((line for line in reversed(lines) if line["kind"] == "step"), {})
    row = {name: last.get(name) for name in _FACTS}
    rank_hours = seconds * (row["world_size"] or 1) / 3600
    epoch = max((line["epoch"] for line in lines if line["kind"] == "epoch"), default=math.nan)
    return row | {
        "status": ends[-1]["status"] if ended else "unfinished",
        "reason": (ends[-1].get("reason") or None) if ended else None,
        "created": pd.Timestamp(first["time"], unit="s", tz="UTC"),
        "seconds": seconds,
        "hosts": len(set(last.get("hosts") or [])) or None,
        "rank_hours": rank_hours,
        "gpu_hours": rank_hours if row["device"] not in (None, "cpu") else math.nan,
        "epoch": epoch,
        "seconds_per_epoch": seconds / epoch if epoch > 0 else math.nan,
        "step": newest.get("step"),
        "train/loss": newest.get("metrics", {}).get("train/loss", math.nan),
    }


def _measured(lines: Sequence[Line]) -> dict[str, Any]:
    """Returns val/* of the best epoch, and each eval/* of the newest checkpoint that it was measured at."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    finite = [line for line in epochs if math.isfinite(line["metrics"]["val/loss"])]
    row: dict[str, Any] = {}
    if epochs:
        # Without a finite loss the last epoch's shows that.
        best = min(finite, key=lambda line: line["metrics"]["val/loss"]) if finite else epochs[-1]
        row |= {"best_step": best["step"]} | best["metrics"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    for line in sorted(evaluations, key=lambda line: line["step"]):
        row |= line["metrics"]
    return row
