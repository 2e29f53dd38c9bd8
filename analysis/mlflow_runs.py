"""Runs that only MLflow has: asked for in batches, never one request a run or a metric."""

import contextlib
import json
import logging
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
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


def facts(experiment: str | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of analysis.runs by name. Raises UserError where MLflow does not answer."""
    uri = paths.tracking_uri()
    file = _sqlite_file(uri)
    if file is not None and not file.exists():
        return {}
    try:
        return _facts(_client(uri), experiment, names)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"MLflow at {without_password(uri)} does not answer ({type(error).__name__})"
        ) from None


def points(ids: Mapping[str, str], metrics: Sequence[str] | None) -> Iterator[tuple[str, pa.Table]]:
    """(run, its points as journals.SCHEMA) for runs by their MLflow ids."""
    if not ids:
        return
    uri = paths.tracking_uri()
    file = _sqlite_file(uri)
    read = _points_by_sql(file, ids, metrics) if file else _points_by_http(uri, ids, metrics)
    for name, frame in read:
        frame = frame.assign(epoch=math.nan)[SCHEMA.names]
        yield name, pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False)


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _facts(client: Any, experiment: str | None, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    if experiment is not None:
        found = client.get_experiment_by_name(experiment)
        ids = [found.experiment_id] if found is not None else []
    else:
        ids = [found.experiment_id for found in client.search_experiments()]
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
    return _at_best_epoch(rows)


def _row(run: Any) -> dict[str, Any]:
    tags, info = run.data.tags, run.info
    row = with_defaults({key: _typed(value) for key, value in run.data.params.items()})
    row["experiment"] = row.pop("name", None)
    end = info.end_time or info.start_time
    seconds = (end - info.start_time) / 1000
    world_size = int(tags.get("world_size", 1))
    device = tags.get("device")
    hours = seconds * world_size / 3600
    return row | {
        "status": _STATUS.get(info.status, "unfinished"),
        "reason": tags.get("end_reason"),
        "source": "mlflow",
        "mlflow_id": info.run_id,
        "created": pd.Timestamp(info.start_time, unit="ms", tz="UTC"),
        "seconds": seconds,
        "world_size": world_size,
        "device": device,
        "hosts": len(tags["hosts"].split(", ")) if tags.get("hosts") else None,
        "rank_hours": hours,
        "gpu_hours": hours if device not in (None, "cpu") else math.nan,
        "commit": tags.get("mlflow.source.git.commit"),
        "uncommitted_changes": tags.get("uncommitted_changes"),
        "packages": _typed(tags["packages"]) if "packages" in tags else None,
        "data_name": tags.get("data_name"),
        "data_digest": tags.get("data_digest"),
        "command": tags.get("command"),
        "sweep": tags.get("sweep"),
        "trial": int(tags["trial"]) if "trial" in tags else None,
        **run.data.metrics,
    }


def _at_best_epoch(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """MLflow tells the last value of a metric; val/* belong to the best epoch."""
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
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Straight from the database: a query a run, on its primary key."""
    chosen = f"and key in ({', '.join('?' * len(metrics))})" if metrics is not None else ""
    query = (
        "select key, step, timestamp / 1000.0, case when is_nan then null else value end"
        f" from metrics where run_uuid = ? {chosen} order by key, step"
    )
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        for name, run_id in ids.items():
            rows = connection.execute(query, (run_id, *(metrics or ()))).fetchall()
            yield name, pd.DataFrame(rows, columns=["metric", "step", "time", "value"])


def _points_by_http(
    uri: str, ids: Mapping[str, str], metrics: Sequence[str] | None
) -> Iterator[tuple[str, pd.DataFrame]]:
    """What MLflow's own charts ask: a request a metric for a hundred runs, sampled beyond 2,500 points."""
    from mlflow.utils.rest_utils import http_request

    client = _client(uri)
    store = client._tracking_client.store
    names = list(ids)
    for start in range(0, len(names), _RUNS_AT_ONCE):
        block = {ids[name]: name for name in names[start : start + _RUNS_AT_ONCE]}
        keys = metrics if metrics is not None else _keys(client, block)
        found: dict[str, list[tuple[Any, ...]]] = {name: [] for name in block.values()}
        for key in keys:
            asked = {"run_ids": list(block), "metric_key": key, "max_results": _POINTS}
            answer = http_request(store.get_host_creds(), _BULK, "GET", params=asked).json()
            for point in answer.get("metrics", []):
                told = (key, int(point["step"]), point["timestamp"] / 1000, float(point["value"]))
                found[block[point["run_id"]]].append(told)
        for name, rows in found.items():
            yield name, pd.DataFrame(rows, columns=["metric", "step", "time", "value"])


def _keys(client: Any, block: Mapping[str, str]) -> list[str]:
    quoted = ", ".join(f"'{run_id}'" for run_id in block)
    experiments = [found.experiment_id for found in client.search_experiments()]
    found = client.search_runs(experiments, f"attributes.run_id IN ({quoted})")
    return sorted({key for run in found for key in run.data.metrics})


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _typed(text: str) -> Any:
    """The mirror writes leaves as JSON, words as they are."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return str(value) if isinstance(value, list) else value
