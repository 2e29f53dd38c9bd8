"""Runs that only MLflow has, compared with their folders."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import analysis
from cvae.errors import UserError
from cvae.tracking import mlflow_mirror
from tests.helpers.mlflow_runs import Server
from tests.helpers.trained_runs import make_journal

METRICS = ["val/loss", "val/kl", "train/loss", "best_step", "step", "model.latent_dim", "seed"]
FACTS = ["status", "world_size", "hosts", "device", "commit", "experiment"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait()
    yield server
    server.kill()


def pushed(home: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Returns the tables of two run folders, which are then removed: only MLflow has them."""
    runs = [make_journal("one", [9.0, 7.0, 8.0]), make_journal("two", [5.0], status="failed")]
    table = analysis.runs("tiny", source="folders")
    curves = analysis.curves(table, ["train/loss", "val/loss"])
    for run in runs:
        mlflow_mirror.sync(run.path, lambda lines: None)
        shutil.rmtree(run.path)
    return table, curves


def compare(home: Path) -> None:
    table, curves = pushed(home)
    for remote in (analysis.runs("tiny"), analysis.runs(names=["one", "two"], source="mlflow")):
        assert remote["source"].unique().tolist() == ["mlflow"]
        for column in METRICS + FACTS:
            assert remote[column].to_dict() == table[column].to_dict(), column
        again = analysis.curves(remote, ["train/loss", "val/loss"])
        order = ["run", "metric", "step"]
        columns = [*order, "value"]
        assert again.astype({"run": str, "metric": str}).sort_values(order)[
            columns
        ].to_numpy().tolist() == (
            curves.astype({"run": str, "metric": str})
            .sort_values(order)[columns]
            .to_numpy()
            .tolist()
        )
        assert set(analysis.curves(remote)["metric"]) == {
            "train/loss",
            "train/kl",
            "val/loss",
            "val/kl",
        }


def test_a_database_says_what_the_folders_said(home: Path) -> None:
    compare(home)


def test_a_server_says_what_the_folders_said(
    home: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    compare(home)


def test_without_mlflow_the_folders_here_are_shown(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_journal("one", [9.0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="does not answer.*only the run folders here"):
        assert analysis.runs("tiny").index.tolist() == ["one"]
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer"):
        analysis.runs("tiny", source="mlflow")
