"""The faults that the campaign injects into a run. Each returns a function that repairs the broken part."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError
from cvae.run.directory import RunDirectory
from slurm import attempts
from slurm.commands import Slurm
from tests.helpers.ranks import lines, slurm_rank
from tests.testcluster import Cluster
from tests.testcluster.hosts import ClusterError
from workflows import runs
from workflows.jobs.run_state import last_submission

Heal = Callable[[], None]


class MlflowServer:
    def __init__(self, home: Path, address: str):
        self.home, self.database = home, home / "server.db"
        with socket.socket() as probe:
            probe.bind((address, 0))
            self.address, self.port = probe.getsockname()
        self.uri = f"http://{self.address}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["--workers", "1", "--host", self.address, "--port", str(self.port)]
        words += ["--backend-store-uri", f"sqlite:///{self.database}"]
        words += ["--artifacts-destination", str(self.home / "artifacts")]
        with open(self.home / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )
        (self.home / "server.pid").write_text(str(self.process.pid))
        # If it is killed while it makes its tables, MLflow leaves a database that never works again.
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, "MLflow's server does not start"
            time.sleep(0.3)

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2):
            return True
        return False

    def kill(self) -> None:
        assert self.process is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Field:
    """The run that gets the faults, with its cluster and MLflow server."""

    def __init__(
        self, cluster: Cluster, run: RunDirectory, server: MlflowServer, dice: random.Random
    ):
        self.cluster, self.run, self.server, self.dice = cluster, run, server, dice
        self.home = server.home
        submission = last_submission(run)
        assert submission is not None
        self.job_id = submission.job_id
        self.slurm = Slurm(str(cluster.slurm_conf))
        self.acted = 0.0
        """The time of the last fault, in unix seconds."""

    def has_noticed(self, since: float) -> bool:
        """Whether the run or SLURM has ended the present attempt."""
        ended = [one.ended or 0.0 for one in attempts.read(self.run.logs, self.job_id)]
        ends = [line["time"] for line in lines(self.run, "end")]
        return (
            max([*ended, *ends], default=0.0) > since
            or self.slurm.job(self.job_id).phase == "queued"
        )

    def has_trained_since(self, when: float) -> bool:
        """Whether the run has trained for some seconds more, after which a watchdog would have ended it."""
        return any(line["time"] > when + 5 for line in lines(self.run, "step"))

    def wait_for_checkpoint(self) -> None:
        before, deadline = self.checkpoints(), time.monotonic() + 300
        while self.checkpoints() <= before and time.monotonic() < deadline:
            time.sleep(0.3)

    def checkpoints(self) -> int:
        return len(lines(self.run, "checkpoint"))

    def rank(self) -> int:
        return self.dice.randrange(2)


class Fault(NamedTuple):
    inject: Callable[[Field], Heal]
    restarts: bool | None = True
    """Whether the run has to restart; None if it may restart or wait."""
    seen: Callable[[Field, float], bool] = lambda field, since: True


def _nothing() -> None:
    pass


def _kill_rank(field: Field) -> Heal:
    slurm_rank(field.run, field.rank()).send_signal(signal.SIGKILL)
    return _nothing


def _stop_rank(field: Field) -> Heal:
    slurm_rank(field.run, field.rank()).send_signal(signal.SIGSTOP)
    return _nothing


def _kill_slurmd(field: Field) -> Heal:
    node = field.dice.choice(field.cluster.nodes)
    node.kill_slurmd()
    return node.start_slurmd


def _cut_link(field: Field) -> Heal:
    node = field.dice.choice(field.cluster.nodes)
    node.cut_link()

    def heal() -> None:
        node.heal_link()
        # By itself slurmd would report within a minute.
        with suppress(ClusterError):
            node.kill_slurmd()
        node.start_slurmd()

    return heal


def _requeue(field: Field) -> Heal:
    field.cluster.command("scontrol", "requeue", field.job_id)
    return _nothing


def _preempt(field: Field) -> Heal:
    wide = ["--nodes=2", "--gpus-per-node=4", "--output=/dev/null", "--wrap=hostname"]
    field.cluster.command("sbatch", "--partition=urgent", *wide)
    return _nothing


def _time_limit(field: Field) -> Heal:
    details = field.slurm.details(field.job_id)
    hours, minutes, _ = details["RunTime"].split(":")
    limit = 60 * int(hours.rpartition("-")[2]) + int(minutes) + 2
    field.cluster.command("scontrol", "update", f"JobId={field.job_id}", f"TimeLimit={limit}")

    def heal() -> None:
        deadline = time.monotonic() + 30
        while field.slurm.job(field.job_id).phase != "queued" and time.monotonic() < deadline:
            time.sleep(0.3)
        field.cluster.command("scontrol", "update", f"JobId={field.job_id}", "TimeLimit=60")

    return heal


def _kill_while_saving(field: Field) -> Heal:
    process, deadline = slurm_rank(field.run, 0), time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(field.run.checkpoints.glob(".step-*.new")):
            break
    process.send_signal(signal.SIGKILL)
    field.acted = time.time()
    return _nothing


def _corrupt_newest(field: Field) -> Heal:
    process = slurm_rank(field.run, 0)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    newest = max(field.run.checkpoints.glob("step-*")) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    newest.write_bytes(content)
    return _nothing


def _fill_disk(field: Field) -> Heal:
    filler = field.run.checkpoints / "filler"
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    return filler.unlink


def _disk_was_full(field: Field, since: float) -> bool:
    return any(
        line["time"] > since and "could not be written" in line["message"]
        for line in lines(field.run, "notice")
    )


def _kill_mlflow(field: Field) -> Heal:
    field.server.kill()
    return field.server.start


def _a_while(field: Field, since: float) -> bool:
    return time.time() > since + 10


def _refuse_requeue(field: Field) -> Heal:
    (field.home / "refuse").touch()
    _kill_rank(field)
    return _nothing


def _stall(field: Field) -> Heal:
    folders = [field.home / name for name in DISKS]
    for folder in folders:
        _freeze(folder, "--freeze")

    def heal() -> None:
        for folder in folders:
            _freeze(folder, "--unfreeze")

    return heal


def _a_minute(field: Field, since: float) -> bool:
    return time.time() > since + 60


FAULTS = {
    "SIGKILL of a rank": Fault(_kill_rank),
    "SIGSTOP of a rank": Fault(_stop_rank),
    "slurmd killed": Fault(_kill_slurmd),
    "network of a host cut": Fault(_cut_link),
    "scontrol requeue": Fault(_requeue),
    "preemption": Fault(_preempt),
    "time limit": Fault(_time_limit),
    "SIGKILL during a checkpoint's write": Fault(_kill_while_saving),
    "newest checkpoint corrupted": Fault(_corrupt_newest),
    "disk full during a save": Fault(_fill_disk, False, _disk_was_full),
    "MLflow's server killed": Fault(_kill_mlflow, False, _a_while),
    "scontrol requeue refused once": Fault(_refuse_requeue),
    "file system stalled for 60 s": Fault(_stall, None, _a_minute),
}


DISKS = {"disk": 256, "small": 4}
"""Separate file systems and their MB: for the runs, and for checkpoints, small enough to be filled."""


def mount_disks(home: Path) -> None:
    for name, size in DISKS.items():
        image = home / f"{name}.img"
        image.touch()
        os.truncate(image, size * 2**20)
        make = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", str(image)]
        subprocess.run(make, check=True)
        (home / name).mkdir()
        subprocess.run(["mount", "-o", "loop", str(image), str(home / name)], check=True)


def _freeze(folder: Path, how: str) -> None:
    """Blocks every write in the kernel, on all hosts, like a network file system that fails over."""
    subprocess.run(["fsfreeze", how, str(folder)], check=True, capture_output=True)


def add_scontrol(home: Path) -> None:
    """Puts a scontrol on PATH that refuses the next requeue if the file `refuse` exists."""
    script = home / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(
        f"""#!/bin/sh
if [ "$1" = requeue ] && rm {home}/refuse 2>/dev/null; then
  echo "slurm_requeue error: Socket timed out on send/recv operation" >&2
  exit 1
fi
exec {shutil.which("scontrol")} "$@"
"""
    )
    script.chmod(0o755)
    os.environ["PATH"] = f"{script.parent}:{os.environ['PATH']}"


def clean_up(home: Path) -> None:
    """Ends the processes that the campaign has started outside the cluster."""
    with suppress(OSError, ValueError):
        os.killpg(int((home / "server.pid").read_text()), signal.SIGKILL)
    os.environ["CVAE_HOME"] = str(home)
    with suppress(UserError):
        runs.main(["cancel", "quiet"])
    for name in DISKS:
        if (home / name).is_mount():
            subprocess.run(["umount", "--lazy", str(home / name)], check=False)


def thaw(home: Path) -> None:
    """Unfreezes the file systems, because no process that waits for one can be ended."""
    for name in DISKS:
        with suppress(subprocess.CalledProcessError):
            _freeze(home / name, "--unfreeze")
