"""Runs and their curves as DataFrames, from run folders and from MLflow."""

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter

from analysis import mlflow_runs, run_folders
from analysis.run_folders import SCHEMA
from cvae.errors import UserError, did_you_mean
from cvae.files import json_file, paths
from cvae.files.paths import printable
from cvae.progress import progress_bar
from cvae.run.directory import RunDirectory, all_runs, find_sweep


class _Trial(BaseModel):
    """The fields of a sweep's trials.json that are used here."""

    index: int
    run: str
    status: str


_TRIALS = TypeAdapter(list[_Trial])
Source = Literal["auto", "folders", "mlflow"]
METRICS = ("val/", "eval/", "eval_")
"""How the names of all metrics of an evaluation begin."""
_CACHE, _FORMAT, _STAMP = ".analysis", "1", b"cvae.stamp"
# Every table has these columns; the values fill those that none of its runs has.
_COLUMNS = {
    "experiment": None, "status": None, "reason": None, "path": None, "source": None, "created": pd.NaT,
    "seconds": math.nan, "world_size": None, "hosts": None, "device": None, "gpu_hours": math.nan,
    "rank_hours": math.nan, "seconds_per_epoch": math.nan, "step": None, "best_step": None, "epoch": math.nan,
    "train_images": None, "seed": None, "commit": None, "uncommitted_changes": None, "packages": None,
    "data_name": None, "data_digest": None, "command": None, "sweep": None, "trial": None, "mlflow_id": None,
    "nan_metrics": None,
}  # fmt: skip


def runs(
    experiment: str | None = None,
    *,
    sweep: str | None = None,
    names: Sequence[str] | None = None,
    source: Source = "auto",
) -> pd.DataFrame:
    """Returns a row per run, by name: those of an experiment, a sweep's trials, or named ones ("latest" too).

    Columns: how it went (status: finished, failed, stopped or unfinished; reason, created, seconds of training,
    world_size, hosts, device, gpu_hours, rank_hours, seconds_per_epoch, step, best_step, epoch, train_images);
    every key of the experiment, as "model.latent_dim"; train/loss (last), val/* (at the best epoch), eval/* (by
    evaluate.py); nan_metrics, those that were measured as NaN (which looks like "not measured" in a frame);
    where it comes from (commit, packages, data_name, data_digest, command, sweep, trial, path, mlflow_id).
    Runs that failed or have not ended are rows like all others.

    source: "folders" reads $CVAE_HOME/runs, "mlflow" the tracking server; "auto" the folders, and from MLflow the
    runs that have no folder here. Raises UserError, with the nearest name, for an unknown name.
    """
    trials = _trials(sweep) if sweep is not None else {}
    wanted = [*(names or []), *trials]
    folders = [] if source == "mlflow" else _folders(wanted, experiment)
    rows = {}
    with progress_bar(len(folders), "run", "runs", delay=2) as bar:
        for run in folders:
            rows[printable(run.name)] = run_folders.facts(run)
            bar.update()
    if experiment is not None:
        rows = {name: row for name, row in rows.items() if row.get("experiment") == experiment}
    lacking = [
        name for name in wanted if printable(Path(name).name) not in rows and name != "latest"
    ]
    if source == "mlflow" or (
        source == "auto" and (experiment is not None or set(lacking) - set(trials))
    ):
        for name, row in _from_mlflow(experiment, wanted, must=source == "mlflow").items():
            rows.setdefault(name, row)
    if not rows:
        raise UserError(_not_found(experiment, sweep, wanted))
    for name in wanted:
        if printable(Path(name).name) not in rows and name not in trials and name != "latest":
            raise UserError(_not_found(None, None, [name]))
    for name, trial in trials.items():
        row = rows.setdefault(name, {"status": "unfinished", "reason": "it has not begun"})
        row |= {"sweep": sweep, "trial": trial.index}
        if trial.status == "stopped early":
            row |= {"status": "stopped", "reason": "stopped early by the sweep"}
    for row in rows.values():
        row["nan_metrics"] = ", ".join(name for name in row if _is_nan(name, row[name])) or None
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame = frame.assign(**{name: v for name, v in _COLUMNS.items() if name not in frame})
    frame = frame[[*_COLUMNS, *sorted(set(frame.columns) - set(_COLUMNS))]].rename_axis("run")
    return frame.sort_values("trial" if sweep is not None else "created", kind="stable")


def curves(frame: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Returns every point of the runs of a table of runs(), tidy: run, metric, step, epoch, time, value.

    metrics: names, as ["train/loss", "val/loss"]; None for all. Only evaluations have an epoch; time is in unix
    seconds. Parquet files in $CVAE_HOME/.analysis cache what has been read of journals. Runs that only an MLflow
    server has (whose database cannot be read) have at most 2,500 points per curve, which the server picks.

    Raises UserError, with the nearest name, if none of the runs has a metric, unless they have none at all.
    """
    folders = {str(name): Path(path) for name, path in frame["path"].dropna().items()}
    remote = frame[frame["path"].isna()]["mlflow_id"].dropna()
    ids = {str(name): str(run_id) for name, run_id in remote.items()}
    tables: list[pa.Table] = []
    with (
        progress_bar(len(folders), "run", "curves", delay=2) as bar,
        ThreadPoolExecutor(4) as threads,
    ):

        def read(run: tuple[str, Path]) -> pa.Table:
            table = _points(run[1])
            if metrics is not None:
                chosen = pa.array(list(metrics), pa.string())
                table = table.filter(pc.is_in(table["metric"], chosen))
            return _with_run(run[0], table)

        for table in threads.map(read, folders.items()):
            tables.append(table)
            bar.update()
    tables += [_with_run(name, table) for name, table in mlflow_runs.points(ids, metrics)]
    if metrics is not None and (lacking := set(metrics) - _names(tables)):
        known = _names(_points(path) for path in folders.values())
        known |= _names(table for _, table in mlflow_runs.points(ids, None))
        if known:
            name = next(name for name in metrics if name in lacking)
            near = did_you_mean(name, known) or f"; they have {', '.join(sorted(known))}"
            raise UserError(f"{name}: none of these runs has such a metric{near}")
    tables = [table for table in tables if len(table)] or [_with_run("", SCHEMA.empty_table())]
    whole = pa.concat_tables(tables).unify_dictionaries()
    points: pd.DataFrame = whole.to_pandas(split_blocks=True, self_destruct=True)
    return points


def _names(tables: Iterable[pa.Table]) -> set[str]:
    return {name for table in tables for name in table["metric"].unique().to_pylist()}


def _is_nan(name: str, value: object) -> bool:
    return name.startswith(METRICS) and isinstance(value, float) and math.isnan(value)


def _with_run(run: str, table: pa.Table) -> pa.Table:
    """Returns a table of points with the run in a first column; run and metric are dictionary-encoded."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), [run])
    position = table.schema.get_field_index("metric")
    table = table.set_column(position, "metric", table["metric"].dictionary_encode())
    return table.add_column(0, "run", column)


def _points(folder: Path) -> pa.Table:
    """Returns the points of a run's journal, from the cache unless the journal has changed since."""
    journal = folder / "journal.jsonl"
    try:
        status = journal.stat()
    except OSError:
        return SCHEMA.empty_table()
    stamp = f"{_FORMAT} {journal} {status.st_size} {status.st_mtime_ns}".encode()
    key = hashlib.sha256(str(journal).encode()).hexdigest()[:24]
    file = paths.home() / _CACHE / f"{key}.parquet"
    try:
        table = pq.read_table(file, use_threads=False)
        if (table.schema.metadata or {}).get(_STAMP) == stamp:
            return table.cast(SCHEMA)
    except (OSError, pa.ArrowException):
        pass  # absent or damaged: read again
    table = run_folders.points(journal)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_STAMP: stamp}), sink, compression="zstd")
    try:
        file.parent.mkdir(exist_ok=True)
        paths.write_atomically(file, sink.getvalue().to_pybytes())
    except OSError:
        pass  # a full or read-only home needs no cache
    return table


def _folders(wanted: Sequence[str], experiment: str | None) -> list[RunDirectory]:
    """Returns the run folders to read, of those that are here."""
    if not wanted:
        return all_runs() if experiment is not None else []
    folders = []
    for name in dict.fromkeys(wanted):
        try:
            folders.append(RunDirectory.open(name))
        except UserError:
            continue
    return folders


def _trials(sweep: str) -> dict[str, _Trial]:
    """Returns the trials of a sweep by the name of their newest run."""
    folder = find_sweep(sweep)
    trials = json_file.load(folder / "trials.json", _TRIALS)
    if not trials:
        raise UserError(f"{folder.name}: none of its trials has begun")
    return {trial.run: trial for trial in trials}


def _from_mlflow(
    experiment: str | None, wanted: Sequence[str], must: bool
) -> dict[str, dict[str, Any]]:
    try:
        return mlflow_runs.facts(experiment, wanted)
    except UserError as error:
        if must:
            raise
        warnings.warn(f"{error}; only the run folders here are shown", stacklevel=3)
        return {}


def _not_found(experiment: str | None, sweep: str | None, wanted: Sequence[str]) -> str:
    if experiment is not None:
        files = (run.experiment_file for run in all_runs())
        near = did_you_mean(
            experiment, {str(run_folders.config(file).get("experiment")) for file in files}
        )
        return f"{experiment}: no run of such an experiment in {paths.runs_dir()}{near}"
    if sweep is None and wanted:
        near = did_you_mean(wanted[0], (run.name for run in all_runs()))
        return f"{wanted[0]}: no such run in {paths.runs_dir()}{near}"
    return "which runs? name an experiment, a sweep or runs"
