"""Runs and their curves as DataFrames, from run folders and from MLflow."""

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter

from analysis import mlflow_runs, run_folders
from cvae.errors import UserError, did_you_mean
from cvae.files import json_file, paths
from cvae.files.paths import printable
from cvae.progress import progress_bar
from cvae.run.directory import RunDirectory, all_runs, find_sweep


class _Trial(BaseModel):
    """What of a sweep's trials.json is of use here."""

    index: int
    run: str
    status: str


_TRIALS = TypeAdapter(list[_Trial])
Source = Literal["auto", "folders", "mlflow"]
METRICS = ("val/", "eval/", "eval_")
"""How the names of all metrics of an evaluation begin."""
_CACHE, _FORMAT, _STAMP = ".analysis", "1", b"cvae.stamp"
# What every table has, whatever its runs have told.
_COLUMNS = {
    "experiment": None, "status": None, "reason": None, "path": None, "source": None, "created": pd.NaT,
    "seconds": math.nan, "world_size": None, "hosts": None, "device": None, "gpu_hours": math.nan,
    "rank_hours": math.nan, "seconds_per_epoch": math.nan, "step": None, "best_step": None,
    "epoch": math.nan,
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
    """A row a run, by its name; all of an experiment, the trials of a sweep, or the named ones ("latest" too).

    Columns: how it went (status: finished, failed, stopped or unfinished; reason, created, seconds of training,
    world_size, hosts, device, gpu_hours, rank_hours, seconds_per_epoch, step, best_step, epoch, train_images);
    every key of the experiment, as "model.latent_dim"; train/loss (last), val/* (at the best epoch), eval/* (by
    evaluate.py); nan_metrics, those that were measured as NaN (which looks like "not measured" in a frame);
    where it comes from (commit, packages, data_name, data_digest, command, sweep, trial, path, mlflow_id).
    Runs that failed or go on are rows like all others.

    source: "folders" reads $CVAE_HOME/runs, "mlflow" the tracking server; "auto" the folders, and from MLflow the
    runs whose folder is not here. Raises UserError, with the nearest name, where nothing is found.
    """
    trials = _trials(sweep) if sweep is not None else {}
    wanted = list(names or [])
    if sweep is not None:
        wanted += list(trials)
    folders = [] if source == "mlflow" else _folders(wanted, experiment)
    rows = {}
    with progress_bar(len(folders), "run", "runs", delay=2) as bar:
        for run in folders:
            rows[printable(run.name)] = run_folders.facts(run)
            bar.update()
    if experiment is not None:
        rows = {name: row for name, row in rows.items() if row.get("experiment") == experiment}
    lacking = (
        {name for name in wanted if printable(Path(name).name) not in rows}
        - set(trials)
        - {"latest"}
    )
    if source == "mlflow" or (source == "auto" and (experiment is not None or lacking)):
        for name, row in _from_mlflow(experiment, wanted, must=source == "mlflow").items():
            rows.setdefault(name, row)
    if not rows:
        raise UserError(_nothing(experiment, sweep, wanted))
    for name, trial in trials.items():
        if name in rows:
            rows[name] |= {"sweep": sweep, "trial": trial.index}
            if trial.status == "stopped early":
                rows[name] |= {"status": "stopped", "reason": "stopped early by the sweep"}
    for name in wanted:
        if printable(Path(name).name) in rows or name == "latest":
            continue
        if name not in trials:
            raise UserError(_nothing(None, None, [name]))
        told = {"sweep": sweep, "trial": trials[name].index}
        rows[name] = {"status": "unfinished", "reason": "it has not begun", **told}
    for row in rows.values():
        row["nan_metrics"] = ", ".join(name for name in row if _is_nan(name, row[name])) or None
    frame = pd.DataFrame.from_dict(rows, orient="index")
    for name, value in _COLUMNS.items():
        if name not in frame:
            frame[name] = value
    ordered = [*_COLUMNS, *sorted(set(frame.columns) - set(_COLUMNS))]
    frame = frame[ordered].rename_axis("run")
    return frame.sort_values("trial" if sweep is not None else "created", kind="stable")


def curves(frame: pd.DataFrame, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """Every point of the runs of a table of runs(), tidy: run, metric, step, epoch, time, value.

    metrics: names, as ["train/loss", "val/loss"]; None for all. epoch is known of evaluations alone; time in unix
    seconds. Journals are read once: Parquet files in $CVAE_HOME/.analysis hold what has been read. Of runs that
    only an MLflow server has (no database we can read), a curve has at most 2,500 points, which it picks.

    Raises UserError, with the nearest name, for a metric that none of the runs has, if they have any.
    """
    folders = {name: Path(path) for name, path in frame["path"].dropna().items()}
    elsewhere = frame[frame["path"].isna()]["mlflow_id"].dropna()
    tables: list[pa.Table] = []
    with (
        progress_bar(len(folders), "run", "curves", delay=2) as bar,
        ThreadPoolExecutor(4) as threads,
    ):

        def read(item: tuple[Any, Path]) -> pa.Table:
            return _labelled(str(item[0]), _chosen(_points(item[1]), metrics))

        for table in threads.map(read, folders.items()):
            tables.append(table)
            bar.update()
    for name, table in mlflow_runs.points(dict(elsewhere.items()), metrics):
        tables.append(_labelled(name, table))
    _check_there(tables, metrics, folders, dict(elsewhere.items()))
    whole = pa.concat_tables(
        [t for t in tables if len(t)] or [_labelled("", run_folders.SCHEMA.empty_table())]
    )
    found: pd.DataFrame = whole.unify_dictionaries().to_pandas(
        split_blocks=True, self_destruct=True
    )
    return found


def _check_there(
    tables: Sequence[pa.Table],
    metrics: Sequence[str] | None,
    folders: Mapping[Any, Path],
    elsewhere: Mapping[str, str],
) -> None:
    there = {name for table in tables for name in table["metric"].unique().to_pylist()}
    lacking = [name for name in metrics or () if name not in there]
    if not lacking:
        return
    known = {
        name for path in folders.values() for name in _points(path)["metric"].unique().to_pylist()
    }
    for _, table in mlflow_runs.points(elsewhere, None):
        known.update(table["metric"].unique().to_pylist())
    if known:
        near = did_you_mean(lacking[0], known) or f"; they have {', '.join(sorted(known))}"
        raise UserError(f"{lacking[0]}: none of these runs has such a metric{near}")


def _is_nan(name: str, value: object) -> bool:
    return name.startswith(METRICS) and isinstance(value, float) and math.isnan(value)


def _labelled(run: str, table: pa.Table) -> pa.Table:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), [run])
    position = table.schema.get_field_index("metric")
    table = table.set_column(position, "metric", table["metric"].dictionary_encode())
    return table.add_column(0, "run", column)


def _chosen(table: pa.Table, metrics: Sequence[str] | None) -> pa.Table:
    if metrics is None:
        return table
    return table.filter(pc.is_in(table["metric"], pa.array(list(metrics), pa.string())))


def _points(folder: Path) -> pa.Table:
    """The points of a run's journal, from the cache where that is of the same journal."""
    journal = folder / "journal.jsonl"
    try:
        status = journal.stat()
    except OSError:
        return run_folders.SCHEMA.empty_table()
    stamp = f"{_FORMAT} {journal} {status.st_size} {status.st_mtime_ns}".encode()
    file = (
        paths.home() / _CACHE / f"{hashlib.sha256(str(journal).encode()).hexdigest()[:24]}.parquet"
    )
    try:
        table = pq.read_table(file, use_threads=False)
        if (table.schema.metadata or {}).get(_STAMP) == stamp:
            return table.cast(run_folders.SCHEMA)
    except (OSError, pa.ArrowException):
        pass  # not there yet, or damaged: read anew
    table = run_folders.points(journal)
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_STAMP: stamp}), sink, compression="zstd")
    try:
        file.parent.mkdir(exist_ok=True)
        paths.write_atomically(file, sink.getvalue().to_pybytes())
    except OSError:
        pass  # a full or read-only home: it goes without
    return table


def _folders(wanted: Sequence[str], experiment: str | None) -> list[RunDirectory]:
    """The run folders to read, of those that are here."""
    if not wanted:
        return all_runs() if experiment is not None else []
    found = []
    for name in dict.fromkeys(wanted):
        try:
            found.append(RunDirectory.open(name))
        except UserError:
            continue
    return found


def _trials(sweep: str) -> dict[str, _Trial]:
    """The trials of a sweep by the name of their (newest) run."""
    folder = find_sweep(sweep)
    file = folder / "trials.json"
    trials = json_file.load(file, _TRIALS)
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
        warnings.warn(f"{error}; the run folders here are all that is shown", stacklevel=3)
        return {}


def _nothing(experiment: str | None, sweep: str | None, wanted: Sequence[str]) -> str:
    if experiment is not None:
        known = {
            str(run_folders.config(run.experiment_file).get("experiment")) for run in all_runs()
        }
        return f"{experiment}: no run of such an experiment in {paths.runs_dir()}{did_you_mean(experiment, known)}"
    if sweep is None and wanted:
        near = did_you_mean(wanted[0], (run.name for run in all_runs()))
        return f"{wanted[0]}: no such run in {paths.runs_dir()}{near}"
    return "which runs? name an experiment, a sweep or runs"
