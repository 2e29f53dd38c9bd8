"""`make mlflow` on a host that others use, too; and what the store is when it is new."""

import os
import socket
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from cvae.errors import UserError
from cvae.tracking.mlflow_store import create_store, experiment_id
from workflows import mlflow_ui


def test_a_port_that_is_taken_is_nobodys_address(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken.*make mlflow PORT="):
            mlflow_ui.main([str(port)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mlflow_ui, "_FIRST_PORT", port)
            assert mlflow_ui._port(None) != port
        assert mlflow_ui._listens(os.getpid(), port)
        idle = subprocess.Popen(["sleep", "60"])
        try:
            assert not mlflow_ui._listens(idle.pid, port), "that is another's server"
        finally:
            idle.kill()
            idle.wait()
        with (
            subprocess.Popen(["false"]) as failing,
            pytest.raises(UserError, match="does not serve"),
        ):
            mlflow_ui._wait_for(failing, port)
    for odd in ("x", "0", "70000", "²", "9" * 5000, ""):
        with pytest.raises(UserError, match=r"PORT=.{,60}: a port is"):
            mlflow_ui.main([odd])


def test_no_password_is_on_the_servers_command_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, Any]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: started.append((command, env)))
    mlflow_ui._start("postgresql://ann:hush@db/m", 5001)
    [(command, environment)] = started
    assert "hush" not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://ann:hush@db/m"


def test_the_default_experiment_keeps_its_files_beside_the_store(
    home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    create_store(f"sqlite:///{home / 'mlflow.db'}")
    connection = sqlite3.connect(home / "mlflow.db")
    try:
        experiments = connection.execute(
            "select name, artifact_location from experiments"
        ).fetchall()
    finally:
        connection.close()
    assert experiments == [("Default", (home / "mlruns" / "0").as_uri())]
    assert list(elsewhere.iterdir()) == []

    # Filled, each of its experiments has a link, up to a number that a screen holds.
    uri = f"sqlite:///{home / 'mlflow.db'}"
    client = MlflowClient(uri)
    for number in range(9):
        experiment_id(client, f"☃ {number}/\x1b[2J", uri)
        facts = mlflow_ui._facts(uri, 5001)
        links = dict(facts[1:-2])
        newest = [f"☃ {one}/\\x1b[2J" for one in range(number, max(-1, number - 8), -1)]
        assert list(links) == newest + ["all others"] * (number > 7)
        for one, link in enumerate(list(links.values())[:8]):
            made = client.get_experiment_by_name(f"☃ {number - one}/\x1b[2J")
            assert link == f"http://127.0.0.1:5001/#/experiments/{made.experiment_id}/runs"
