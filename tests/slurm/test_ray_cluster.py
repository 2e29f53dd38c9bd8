"""Ray inside a job, at sites where it does not start."""

import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from slurm import ray_cluster
from slurm.ray_cluster import private_folder, trouble


def python(folder: Path, text: str) -> str:
    """An interpreter in a folder with a space, which does no more than that."""
    folder = folder / "a folder"
    folder.mkdir()
    (folder / "python").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "python").chmod(0o755)
    return str(folder / "python")


@pytest.mark.parametrize("address", [None, "n1:6379"])
def test_actors_start_in_an_environment_whose_path_has_a_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    arguments_of_init: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def init(**arguments: Any) -> None:
        arguments_of_init.update(arguments)
        raise Enough

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(sys, "executable", python(tmp_path, "echo started"))
    monkeypatch.setenv("CVAE_RAY_GPUS", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:hush@mlflow")
    if address:
        monkeypatch.setenv("CVAE_RAY_ADDRESS", address)
    with pytest.raises(Enough), ray_cluster.connect():
        pass
    # Whoever may look at Ray can read it.
    assert "hush" not in str(arguments_of_init)
    # As Ray does, in runtime_env/context.py.
    command = f"exec {arguments_of_init['runtime_env']['py_executable']} default_worker.py"
    assert subprocess.check_output(["bash", "-c", command], text=True) == "started\n"


def test_a_node_whose_ray_does_not_start_ends_with_rays_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = "PermissionError: [Errno 13] Permission denied: '/tmp/ray/session_1'"
    monkeypatch.setattr(
        sys, "executable", python(tmp_path, f'echo "{words}" >&2; echo bye; exit 1')
    )
    monkeypatch.setattr(ray_cluster, "_POLL_S", 0.02)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with socket.create_server(("127.0.0.1", 0)) as head:
        (tmp_path / "ray_head").write_text(f"127.0.0.1:{head.getsockname()[1]}")
        with pytest.raises(RuntimeError) as caught:
            ray_cluster.run(tmp_path, [], 1, None, [])
    text = f"ray start on {socket.gethostname()} ended with status 1: {words} (start.log)"
    assert str(caught.value) == text
    assert words in capfd.readouterr().out


def test_the_driver_reports_how_many_nodes_joined(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    monkeypatch.setattr(ray_cluster, "_POLL_S", 0.01)
    monkeypatch.setattr(ray_cluster, "_HEAD_PATIENCE_S", 0.05)
    with caplog.at_level(logging.INFO):
        for nodes in ("2", "3"):
            monkeypatch.setenv("CVAE_RAY_NODES", nodes)
            ray_cluster._count_nodes()
    logged = [(record.levelname, record.message) for record in caplog.records]
    assert logged == [("INFO", "2 of 2 nodes joined"), ("WARNING", "2 of 3 nodes joined")]


def test_rays_folder_is_private_and_short_enough_for_its_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = "ray/session_2026-11-25_12-46-09_123456_1234567/sockets/plasma_store.1"
    for base in (tmp_path / ("long" * 20), Path("/tmp")):
        base.mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(base))
        with private_folder() as folder, private_folder() as other:
            assert folder != other
            assert folder.stat().st_mode & 0o777 == 0o700
            assert len(str(folder / session)) <= 107
        assert not folder.exists()


def test_trouble_is_the_error_in_rays_logs(tmp_path: Path) -> None:
    logs = tmp_path / "ray" / "session_1" / "logs"
    logs.mkdir(parents=True)
    assert trouble(tmp_path) == ""
    line = "[2026-11-25 12:46:09,123 E 17 17] (raylet) main.cc:9: Failed to start"
    (logs / "raylet.out").write_text(f"{line}\nall is well\n")
    assert trouble(tmp_path) == "Failed to start (raylet.out)"
    (logs / "raylet.err").write_text("bash: line 1: /a/my: No such file or directory\n")
    os.utime(logs / "raylet.err", (0, 0))
    assert trouble(tmp_path) == "bash: line 1: /a/my: No such file or directory (raylet.err)"


@pytest.mark.parametrize(
    ("name", "node", "address"),
    [("127.0.1.1", 0, "10.0.0.1"), ("127.0.1.1", 1, "10.0.0.2"), ("10.9.0.1", 0, None)],
)
def test_a_node_whose_own_name_is_loopback_takes_the_address_that_others_see(
    name: str, node: int, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    routes = {
        "n2": "10.0.0.1",
        "n1": "10.0.0.2",
    }  # this node's own address, by where the route leads
    monkeypatch.setattr(ray_cluster, "source_address", routes.__getitem__)
    monkeypatch.setattr(socket, "gethostbyname", lambda own: name)
    monkeypatch.setattr("submitit.JobEnvironment", lambda: SimpleNamespace(hostnames=["n1", "n2"]))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("CVAE_RAY_NODE_ADDRESS", "")
    monkeypatch.delenv("CVAE_RAY_NODE_ADDRESS")
    ray_cluster._set_node_address(node)
    assert os.environ.get("CVAE_RAY_NODE_ADDRESS") == address
