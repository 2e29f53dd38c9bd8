"""Makes run directories as training leaves them, reads points from MLflow's database, starts a server."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from mlflow.tracking import MlflowClient
from PIL import Image

from cvae.run.journal import Journal

EXPERIMENT = """
name: toy experiment
seed: 1
model: {backbone: mlp, latent_dim: 20, condition: null}
optimizer: {lr: 0.001, betas: [0.9, 0.999]}
"""
METRICS = ("train/loss", "train/kl", "train/images_per_second")
COMMAND = "workflows/launch.py '```\n# <b>x</b>' --gpus 2"
START = {
    "world_size": 2,
    "hosts": ["node1", "node1", "node2"],
    "device": "cpu",
    "job_id": "17",
    "commit": "0123abc",
    "packages": {"torch": "2.13.0", "diffusers": None},
    "data_name": "scenes",
    "data_digest": "d" * 64,
    "data_manifest": "data/scenes-64/manifest.json",
}


class Run:
    """A run directory with the journal that training would write."""

    def __init__(self, home: Path, name: str) -> None:
        self.path = home / "runs" / name
        (self.path / "pictures").mkdir(parents=True)
        (self.path / "experiment.yaml").write_text(EXPERIMENT)
        (self.path / "launch.json").write_text(json.dumps([{"command": COMMAND}]))
        self.journal = Journal(self.path / "journal.jsonl")
        self.journal.append("start", **START, step=0)

    def steps(self, *steps: int) -> None:
        for step in steps:
            values = {name: i + 1 / (step + 1) for i, name in enumerate(METRICS)}
            self.journal.append("step", step=step, metrics=values)

    def picture(self, step: int) -> None:
        path = self.path / "pictures" / f"samples-{step}.png"
        Image.new("RGB", (40, 20), (step % 256, 0, 0)).save(path)
        self.journal.append("picture", key="test/samples", step=step, path=f"pictures/{path.name}")

    def end(self, status: str = "finished") -> None:
        self.journal.append("end", status=status, step=0, reason="")

    @property
    def run_id(self) -> str:
        run_id: str = json.loads((self.path / "mlflow.json").read_text())["run_id"]
        return run_id

    @property
    def acknowledged(self) -> int:
        """The bytes of the journal that the mirror has sent."""
        file = self.path / "mlflow.json"
        return int(json.loads(file.read_text())["offset"]) if file.exists() else 0

    @property
    def log(self) -> str:
        return (self.path / "logs" / "mlflow.log").read_text()


def points(database: Path, run: Run) -> list[tuple[str, int]]:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        query = "select key, step from metrics where run_uuid = ? order by key, step"
        return connection.execute(query, (run.run_id,)).fetchall()


def each_once(*steps: int) -> list[tuple[str, int]]:
    return sorted((name, step) for name in METRICS for step in steps)


def images(client: MlflowClient, run: Run) -> list[str]:
    return sorted(file.path for file in client.list_artifacts(run.run_id, "images"))


class Server:
    """An `mlflow server` of its own on loopback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "mlflow.db"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                    *("--backend-store-uri", f"sqlite:///{self.database}"),
                    *("--artifacts-destination", str(self.folder / "artifacts")),
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={
                    **os.environ,
                    "MLFLOW_DISABLE_TELEMETRY": "true",
                    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                },
            )

    def wait(self) -> None:
        for _ in range(1200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health"):
                return
            time.sleep(0.1)
        raise TimeoutError((self.folder / "log").read_text())

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
