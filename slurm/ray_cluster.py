"""A Ray cluster inside one job: Ray's head with the driver on the first node, a raylet on every other.

On this machine alone Ray listens on loopback only. Between hosts it listens on all interfaces (Ray has no
option for less), so every cluster has a token of its own, without which nobody is heard.
"""

import logging
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import submitit

from cvae.distributed.network_interface import is_loopback, source_address
from cvae.distributed.stop_flag import StopFlag
from cvae.errors import UserError
from cvae.files.paths import write_atomically
from slurm.ray_files import private_folder, trouble

# Not MLflow's address: trials write to their journals only, and whoever may look at Ray can read this.
_TOLD = ("CVAE_HOME", "CVAE_CODE", "PYTHONPATH")
# Beside Ray's files: why the driver has ended, in one line.
PROBLEM = "problem.txt"
_NODE_ADDRESS = "CVAE_RAY_NODE_ADDRESS"
_HEAD_PATIENCE_S = 300.0  # a cold file system
_POLL_S = 1.0
# After SIGTERM: the trials save, then Ray ends.
_STOP_PATIENCE_S = 90.0
# For the last words of what runs beside the driver; SLURM, which sends the signal, waits for less.
_HELPER_S, _STOPPED_HELPER_S = 60.0, 8.0
_log = logging.getLogger(__name__)


class ClusterResult(NamedTuple):
    status: str
    """finished | failed | stopped (by a signal)."""
    reason: str
    signals: tuple[str, ...] = ()


def write_token(folder: Path) -> dict[str, str]:
    """Makes the cluster's token; returns the environment of all that are to take part."""
    file = folder / "ray_token"
    # Nobody else's from the first moment on.
    handle, nascent = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "w") as writer:
        writer.write(secrets.token_urlsafe(32))
    os.replace(nascent, file)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


def run(
    folder: Path, driver: list[str], gpus: int, address: str | None, beside: list[str]
) -> ClusterResult | None:
    """Called once on every node of a job. driver: `python -m …`, run on the first node where Ray is up.

    gpus: that each node gives. address: a Ray that is there already, instead. beside: another module that is
    run while the driver runs, until its standard input ends. Raises RuntimeError where the driver ends badly.
    """
    node, nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _set_node_address(node)
    stop = StopFlag()
    meeting = folder / "ray_head"
    with private_folder() as ray_folder:
        if node > 0:
            _worker(meeting, gpus, stop, ray_folder)
            return None
        meeting.unlink(missing_ok=True)
        environment = _environment(nodes if address is None else 2, meeting, ray_folder)
        environment |= {"CVAE_RAY_GPUS": str(gpus), "CVAE_RAY_NODES": str(nodes)}
        if address is not None:
            environment["CVAE_RAY_ADDRESS"] = address
        return _head(driver, beside, environment, meeting, stop)


def _head(
    driver: list[str], beside: list[str], environment: dict[str, str], meeting: Path, stop: StopFlag
) -> ClusterResult:
    problem = Path(environment["RAY_TMPDIR"], PROBLEM)
    with _helper(beside, stop):
        # In a session of its own: what ends this process group must not cut off the driver's last words.
        process = subprocess.Popen(
            [sys.executable, "-m", *driver],
            env=environment,
            start_new_session=True,
            preexec_fn=_ignore_warning,
        )
        try:
            status = _wait(process, stop)
        finally:
            if stop.signal:
                _let_jobs_save(meeting)
            meeting.unlink(missing_ok=True)
            _end(process)
    if stop.signal:
        return ClusterResult("stopped", f"{stop.signal}, the trials saved", (stop.signal,))
    if status:
        told = problem.read_text() if problem.exists() else f"the driver ended with status {status}"
        raise RuntimeError(told)
    return ClusterResult("finished", "")


@contextmanager
def connect() -> Iterator[float | None]:
    """In the driver: Ray is up, as head of this job's cluster or as the one at the given address.

    Yields, of the latter, the GPUs of its smallest node that has any. Raises UserError where it does not answer.
    """
    import ray

    address = os.environ.get("CVAE_RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    # Ray hands it to a shell as it is, and a path may have a space.
    runtime: dict[str, Any] = {"py_executable": shlex.quote(sys.executable)}
    if address:
        try:
            # Its raylets know nothing of this job.
            told = {key: os.environ[key] for key in _TOLD if key in os.environ}
            ray.init(address=address, runtime_env={**runtime, "env_vars": told}, **quiet)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"no Ray cluster answers at {address}: {error}") from None
    else:
        gpus = int(os.environ["CVAE_RAY_GPUS"])
        # The head's processes end with this one, however it ends.
        ray.init(
            address="local",
            num_cpus=max(1, gpus),
            num_gpus=gpus,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            runtime_env=runtime,
            _node_ip_address=os.environ.get(_NODE_ADDRESS),
            **quiet,
        )
        write_atomically(
            Path(os.environ["CVAE_RAY_MEETING"]), ray.get_runtime_context().gcs_address
        )
    try:
        gpus_there = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
        if not any(gpus_there):
            raise UserError(
                f"the Ray cluster at {address} offers no GPU (`ray start --num-gpus=…`)"
            )
        if not address:
            threading.Thread(target=_count_nodes, daemon=True).start()
        yield min(filter(None, gpus_there)) if address else None
    finally:
        ray.shutdown()


def _count_nodes() -> None:
    """Reports how many nodes take part, once all do or no more are to be expected."""
    import ray

    nodes = int(os.environ.get("CVAE_RAY_NODES", 1))
    deadline = time.monotonic() + _HEAD_PATIENCE_S
    joined = 1
    with suppress(Exception):  # Ray ends
        while joined < nodes and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            joined = sum(node["Alive"] for node in ray.nodes())
        text = f"{joined} of {nodes} nodes joined"
        _log.log(logging.INFO if joined == nodes else logging.WARNING, text)


def _set_node_address(node: int) -> None:
    """Has Ray take this node's address on the route to another node, if its own name leads to itself alone.

    Without a way to the internet Ray would take what the name resolves to, on many systems 127.0.1.1.
    """
    if "SLURM_JOB_NODELIST" not in os.environ:
        return
    hosts = submitit.JobEnvironment().hostnames
    with suppress(UserError, OSError):
        if len(hosts) > 1 and is_loopback(socket.gethostbyname(socket.gethostname())):
            address = source_address(hosts[1] if node == 0 else hosts[0])
            if not is_loopback(address):
                os.environ[_NODE_ADDRESS] = address


def _environment(nodes: int, meeting: Path, ray_folder: Path) -> dict[str, str]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "CVAE_RAY_MEETING": str(meeting)}
    environment["RAY_TMPDIR"] = str(ray_folder)
    if nodes == 1:
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback only
    return environment


def _worker(meeting: Path, gpus: int, stop: StopFlag, ray_folder: Path) -> None:
    """Lends this node to the head until that has gone."""
    head = _find_head(meeting, stop)
    if head is None:
        return
    command = ["ray.scripts.scripts", "start", f"--address={head}", "--block"]
    slots = [f"--num-cpus={max(1, gpus)}", f"--num-gpus={gpus}", "--disable-usage-stats"]
    # Not the head's, which is a folder of the head's node.
    slots += ["--object-store-memory=200000000", f"--temp-dir={ray_folder / 'ray'}"]
    if _NODE_ADDRESS in os.environ:
        slots.append(f"--node-ip-address={os.environ[_NODE_ADDRESS]}")
    with open(ray_folder / "start.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, *slots],
            env=_environment(2, meeting, ray_folder),
            preexec_fn=_ignore_warning,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = float("inf")
        while meeting.exists() and _answers(head) and time.monotonic() < deadline:
            if stop.signal and deadline == float("inf"):
                deadline = time.monotonic() + _STOP_PATIENCE_S
            if process.poll() is not None and not stop.signal and meeting.exists():
                print((ray_folder / "start.log").read_text(errors="replace"), flush=True)
                raise RuntimeError(
                    f"ray start on {socket.gethostname()} ended with status {process.returncode}:"
                    f" {trouble(ray_folder) or 'without a word'}"
                )
            time.sleep(_POLL_S)
        if stop.signal:
            _let_jobs_save(meeting)
    finally:
        # A raylet that is told to end drains for half a minute; by now there is nothing to drain.
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def _ignore_warning() -> None:
    """SLURM warns every process of the time limit; to those that bind nothing to SIGUSR2 it would be the end."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _let_jobs_save(meeting: Path) -> None:
    """Waits for the jobs that this cluster's processes have started on this node."""
    deadline = time.monotonic() + _STOP_PATIENCE_S
    while _jobs_here(meeting) and time.monotonic() < deadline:
        time.sleep(0.5)


def _jobs_here(meeting: Path) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = "slurm.local_jobs" in process.cmdline()
            if ours and process.environ().get("CVAE_RAY_MEETING") == str(meeting):
                return True
    return False


def _find_head(meeting: Path, stop: StopFlag) -> str | None:
    deadline = time.monotonic() + _HEAD_PATIENCE_S
    while not stop.signal:
        with suppress(OSError):
            head = meeting.read_text()
            if _answers(head):
                return head
        if time.monotonic() > deadline:
            raise RuntimeError(f"no Ray head after {_HEAD_PATIENCE_S:.0f} s ({meeting})")
        time.sleep(_POLL_S)
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    for _ in range(3):
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return True
        time.sleep(_POLL_S)
    return False


@contextmanager
def _helper(module: list[str], stop: StopFlag) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", *module], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOPPED_HELPER_S if stop.signal else _HELPER_S)
        process.kill()


def _wait(process: "subprocess.Popen[bytes]", stop: StopFlag) -> int:
    deadline = float("inf")
    while (status := process.poll()) is None and time.monotonic() < deadline:
        if stop.signal and deadline == float("inf"):
            _log.info("%s: the trials are told to save", stop.signal)
            process.terminate()
            deadline = time.monotonic() + _STOP_PATIENCE_S
        time.sleep(0.2)
    return status or 0


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    process.kill()
    process.wait()
