"""Run folders as tables: what experiment.yaml, launch.json and the journal say, read at the speed of the disk."""

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
    path = printable(str(run.path))
    row: dict[str, Any] = {"path": path, "source": "folder"} | config(run.experiment_file)
    unreadable = None
    launches, lines = [], list[Line]()
    try:
        launches = run.submissions()
        lines = journal.read_outline(run.journal_file)
    except (UserError, OSError) as error:
        unreadable = f"unreadable: {printable(str(error))[:200]}"
    row["command"] = f"python {launches[0].get('command')}" if launches else None
    row |= _course(lines) | _measured(lines)
    if unreadable is not None:
        row |= {"status": "unfinished", "reason": unreadable}
    epochs = [line for line in lines if line["kind"] == "epoch" and line["epoch"] > 0]
    batch_size = row.get("training.global_batch_size")
    if epochs and isinstance(batch_size, int):
        # By definition of the epoch that is written with a step.
        seen = epochs[-1]["step"] * batch_size
        row["train_images"] = round(seen / epochs[-1]["epoch"])
    return row


def config(file: Path) -> dict[str, Any]:
    """Every leaf of an experiment.yaml by its dotted key; lists as text."""
    try:
        tree, _ = yaml_reader.parse(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    leaves = yaml_model.flatten(tree) if isinstance(tree, dict) else {}
    plain = {key: str(value) if isinstance(value, list) else value for key, value in leaves.items()}
    plain = with_defaults(plain)
    plain["experiment"] = plain.pop("name", None)
    return plain


def with_defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys that an experiment of an older version does not name: it ran with their defaults."""
    return _defaults() | keys if "model.backbone" in keys else keys


@lru_cache
def _defaults() -> dict[str, Any]:
    def leaves(block: type[BaseModel], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, field in block.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= leaves(inner, f"{prefix}{name}.")
            elif not field.is_required():
                value = field.get_default(call_default_factory=True)
                found[prefix + name] = str(list(value)) if isinstance(value, tuple) else value
        return found

    return leaves(Experiment, "")


def points(file: Path) -> pa.Table:
    """Every point of a journal, as SCHEMA."""
    try:
        block = file.read_bytes()
    except OSError:
        return SCHEMA.empty_table()
    lines = block[: block.rfind(b"\n") + 1].split(b"\n")
    points = [line for line in lines if b'"metrics"' in line]
    if not points:
        return SCHEMA.empty_table()
    # Arrow's parser would crash the process on brackets that are nested ten thousand deep.
    if any(b"[" in line or line.count(b"{") != 2 for line in points):
        return _tidied_slowly(file)
    block = b"\n".join([*points, b""])
    try:
        options = pa_json.ReadOptions(use_threads=False, block_size=max(1 << 20, 2 * len(block)))
        return _tidy(pa_json.read_json(pa.BufferReader(block), options))
    except (pa.ArrowException, TypeError, ValueError, LookupError, AttributeError):
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
        (
            name,
            line["step"],
            line["epoch"] if line["kind"] == "epoch" else None,
            line["time"],
            value,
        )
        for line in journal.read(file)[0]
        if line["kind"] in _WITH_METRICS
        for name, value in line["metrics"].items()
    ]
    # By metric, as the fast way has them.
    rows.sort(key=lambda row: row[0])
    columns = zip(*rows, strict=True) if rows else [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _course(lines: Sequence[Line]) -> dict[str, Any]:
    """How the run went: its state, its times, how far it is, on what it ran."""
    starts = [line for line in lines if line["kind"] == "start"]
    ends = [line for line in lines if line["kind"] == "end"]
    if not starts:
        reason = ends[-1].get("reason") if ends else "it has not begun"
        return {"status": ends[-1].get("status") if ends else "unfinished", "reason": reason}
    first, last = starts[0], starts[-1]
    seconds = journal.training_seconds(lines)
    ended = bool(ends) and ends[-1]["time"] >= last["time"]
    newest = next((line for line in reversed(lines) if line["kind"] == "step"), {})
    hosts = set(last.get("hosts") or [])
    row = {name: last.get(name) for name in _FACTS}
    gpu = row["device"] not in (None, "cpu")
    rank_hours = seconds * (row["world_size"] or 1) / 3600
    epochs = [line["epoch"] for line in lines if line["kind"] == "epoch"]
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


def _measured(lines: Sequence[Line]) -> dict[str, Any]:
    """val/* of the best epoch; eval/* of the newest checkpoint that each was measured at."""
    epochs = [line for line in lines if line["kind"] == "epoch"]
    finite = [line for line in epochs if math.isfinite(line["metrics"]["val/loss"])]
    row: dict[str, Any] = {}
    if epochs:
        # Of a run without a finite loss the last says so.
        best = min(finite, key=lambda line: line["metrics"]["val/loss"]) if finite else epochs[-1]
        row |= {"best_step": best["step"]} | best["metrics"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    for line in sorted(evaluations, key=lambda line: line["step"]):
        row |= line["metrics"]
    return row
