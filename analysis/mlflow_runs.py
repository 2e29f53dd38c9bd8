"""Reads runs that only MLflow has, in batches instead of one request per run or metric."""

import contextlib
import json
import logging
import math
import os
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from analysis.run_folders import SCHEMA, with_defaults
from cvae.errors import UserError
from cvae.files import paths
from cvae.redaction import without_password

_STATUS = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "stopped"}
_PAGE, _RUNS_AT_ONCE, _POINTS = 1000, 100, 2500  # limits of MLflow's API
_BULK = "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"
_TAGS = ("uncommitted_changes", "data_name", "data_digest", "command", "sweep", "device")
_COLUMNS = ["metric", "step", "time", "value"]


def facts(experiment: str | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns rows of analysis.runs by name; none of `names` means all. Raises UserError if MLflow fails."""
    uri = paths.tracking_uri()
    file = _sqlite_file(uri)
    if file is not None and not file.exists():
        return {}
    try:
        return _at_best_epoch(_rows(_client(uri), experiment, names))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {without_password(uri)} does not answer ({type(error).__name__})"
        ) from None


def points(ids: Mapping[str, str], metrics: Sequence[str] | None) -> Iterator[tuple[str, pa.Table]]:
    """Yields (run, its points as run_folders.SCHEMA) for runs by their MLflow ids; metrics: None for all."""
    if not ids:
        return
    uri = paths.tracking_uri()
    file = _sqlite_file(uri)
    read = _points_by_sql(file, ids, metrics) if file else _points_by_http(uri, ids, metrics)
    for name, rows in read:
        frame = pd.DataFrame(rows, columns=_COLUMNS).assign(epoch=math.nan)[SCHEMA.names]
        yield name, pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False)


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _rows(client: Any, experiment: str | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    if experiment is None:
        experiments = client.search_experiments()
    else:
        experiments = filter(None, [client.get_experiment_by_name(experiment)])
    ids = [one.experiment_id for one in experiments]
    rows, token = {}, None
    while ids:
        page = client.search_runs(ids, max_results=_PAGE, page_token=token)
        for run in page:
            # A sweep's parent trained nothing.
            if "cvae.run_dir_id" in run.data.tags and (not names or run.info.run_name in names):
                rows[run.info.run_name] = _row(run)
        token = page.token
        if not token:
            break
    return rows


def _row(run: Any) -> dict[str, Any]:
    tags, info = run.data.tags, run.info
    seconds = ((info.end_time or info.start_time) - info.start_time) / 1000
    world_size = int(tags.get("world_size", 1))
    hours = seconds * world_size / 3600
    return (
        with_defaults({key: _typed(value) for key, value in run.data.params.items()})
        | {name: tags.get(name) for name in _TAGS}
        | {
            "status": _STATUS.get(info.status, "unfinished"),
            "reason": tags.get("end_reason"),
            "source": "mlflow",
            "mlflow_id": info.run_id,
            "created": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
            "seconds": seconds,
            "world_size": world_size,
            "hosts": len(tags["hosts"].split(", ")) if tags.get("hosts") else None,
            "rank_hours": hours,
            "gpu_hours": hours if tags.get("device") not in (None, "cpu") else math.nan,
            "commit": tags.get("mlflow.source.git.commit"),
            "packages": _typed(tags["packages"]) if "packages" in tags else None,
            "trial": int(tags["trial"]) if "trial" in tags else None,
        }
        | run.data.metrics
    )


def _at_best_epoch(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Replaces val/*, of which MLflow reports the last values, by those of the best epoch."""
    ids = {name: row["mlflow_id"] for name, row in rows.items()}
    wanted = sorted({key for row in rows.values() for key in row if key.startswith("val/")})
    for name, table in points(ids, wanted) if wanted else ():
        values = table.to_pandas().pivot_table(index="step", columns="metric", values="value")
        if "val/loss" in values and values["val/loss"].notna().any():
            best = values["val/loss"].idxmin()
            rows[name] |= {"best_step": best, **values.loc[best].dropna().to_dict()}
        rows[name]["step"] = int(table["step"].to_pandas().max()) if len(table) else None
    return rows


def _points_by_sql(
    file: Path, ids: Mapping[str, str], metrics: Sequence[str] | None
) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Reads the database directly: one query per run, on its primary key."""
    chosen = f"and key in ({', '.join('?' * len(metrics))})" if metrics is not None else ""
    query = (
        "select key, step, timestamp / 1000.0, case when is_nan then null else value end"
        f" from metrics where run_uuid = ? {chosen} order by key, step"
    )
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        for name, run_id in ids.items():
            yield name, connection.execute(query, (run_id, *(metrics or ()))).fetchall()


def _points_by_http(
    uri: str, ids: Mapping[str, str], metrics: Sequence[str] | None
) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """Reads as MLflow's own charts do: one request per metric for 100 runs, sampled beyond 2,500 points."""
    from mlflow.utils.rest_utils import http_request

    client = _client(uri)
    credentials = client._tracking_client.store.get_host_creds
    for start in range(0, len(ids), _RUNS_AT_ONCE):
        block = dict(list(ids.items())[start : start + _RUNS_AT_ONCE])
        rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        for key in metrics if metrics is not None else _metrics(client, block.values()):
            query = {"run_ids": [*block.values()], "metric_key": key, "max_results": _POINTS}
            answer = http_request(credentials(), _BULK, "GET", params=query).json()
            for point in answer.get("metrics", []):
                row = (key, int(point["step"]), point["timestamp"] / 1000, float(point["value"]))
                rows[point["run_id"]].append(row)
        yield from ((name, rows[run_id]) for name, run_id in block.items())


def _metrics(client: Any, ids: Collection[str]) -> list[str]:
    """Returns the names of all metrics of some runs."""
    quoted = ", ".join(f"'{run_id}'" for run_id in ids)
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, f"attributes.run_id IN ({quoted})")
    return sorted({key for run in runs for key in run.data.metrics})


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _typed(text: str) -> Any:
    """Returns a parameter's value; the mirror writes numbers, lists and null as JSON and words as they are."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return str(value) if isinstance(value, list) else value
