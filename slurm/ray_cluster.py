"""A Ray cluster inside one job: Ray's head with the driver on the first node, a raylet on every other one.

On a single machine Ray listens on loopback only. Between hosts it listens on all interfaces, as Ray has no option
for less, so every cluster has a token of its own, without which it accepts no request.
"""

import logging
import os
import re
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

# Not MLflow's address: trials write to their journals only, and whoever may look at Ray can read this.
_PASSED_ON = ("CVAE_HOME", "CVAE_CODE", "PYTHONPATH")
PROBLEM = "problem.txt"
"""The file in Ray's folder in which the driver writes, in one line, why it ends."""
_NODE_ADDRESS = "CVAE_RAY_NODE_ADDRESS"
_HEAD_PATIENCE_S = 300.0  # a cold file system
_POLL_S = 1.0
# After SIGTERM: the trials save, then Ray ends.
_STOP_PATIENCE_S = 90.0
# For what runs next to the driver to finish; after a signal, SLURM waits for less.
_HELPER_S, _STOPPED_HELPER_S = 60.0, 8.0
# A path to a Unix socket has at most 107 bytes, of which Ray's own names take up to 75.
_LONGEST_FOLDER = 30
# Begins a line of Ray's logs, e.g. "[2026-11-25 12:46:09,123 E 17 17] (raylet) main.cc:9: ".
_LOG_HEADER = re.compile(r"^\[[^\]]*\](?: \([^)]*\))? ?(?:\S+:\d+: )?")
_TROUBLE = re.compile(r"error|fail|exception|denied|no such|cannot|not found|exceed", re.IGNORECASE)
_log = logging.getLogger(__name__)


class ClusterResult(NamedTuple):
    """How a call of run() on the first node ended."""

    status: str  # finished | failed | stopped (by a signal)
    reason: str
    signals: tuple[str, ...] = ()


def write_token(folder: Path) -> dict[str, str]:
    """Writes the cluster's token; returns the environment variables of all processes that take part."""
    file = folder / "ray_token"
    # Nobody else can read it from the first moment on.
    handle, nascent = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "w") as writer:
        writer.write(secrets.token_urlsafe(32))
    os.replace(nascent, file)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}


@contextmanager
def private_folder() -> Iterator[Path]:
    """Makes a folder for Ray's sessions, which by default share /tmp/ray with those of all other users."""
    base = tempfile.gettempdir()
    if len(os.fsencode(base)) > _LONGEST_FOLDER - len("/ray-12345678"):
        base = "/tmp"
    with tempfile.TemporaryDirectory(prefix="ray-", dir=base, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def run(
    folder: Path, driver: list[str], gpus: int, address: str | None, beside: list[str]
) -> ClusterResult | None:
    """Runs Ray on a job's nodes, and the driver on the first; called once on every node.

    driver: a module and its arguments. gpus: how many each node offers. address: that of a running Ray cluster to
    use instead. beside: a module that runs while the driver does, until its standard input ends. Raises
    RuntimeError if the driver fails.
    """
    node, nodes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _set_node_address(node)
    stop = StopFlag()
    meeting = folder / "ray_head"
    with private_folder() as ray_folder:
        if node > 0:
            _lend_node(meeting, gpus, stop, ray_folder)
            return None
        meeting.unlink(missing_ok=True)
        environment = _environment(nodes if address is None else 2, meeting, ray_folder)
        environment |= {"CVAE_RAY_GPUS": str(gpus), "CVAE_RAY_NODES": str(nodes)}
        if address is not None:
            environment["CVAE_RAY_ADDRESS"] = address
        status = _run_driver(driver, beside, environment, meeting, stop)
        if stop.signal:
            return ClusterResult("stopped", f"{stop.signal}, the trials saved", (stop.signal,))
        if status:
            problem = ray_folder / PROBLEM
            known = problem.exists()
            raise RuntimeError(
                problem.read_text() if known else f"the driver ended with status {status}"
            )
    return ClusterResult("finished", "")


def _run_driver(
    driver: list[str], beside: list[str], environment: dict[str, str], meeting: Path, stop: StopFlag
) -> int:
    """Returns the driver's exit status; 0 if it had to be killed after a signal."""
    with _helper(beside, stop):
        # In a session of its own, so that what ends this process group does not cut off the driver's last lines.
        process = subprocess.Popen(
            [sys.executable, "-m", *driver],
            env=environment,
            start_new_session=True,
            preexec_fn=_ignore_warning,
        )
        deadline = float("inf")
        try:
            while (status := process.poll()) is None and time.monotonic() < deadline:
                if stop.signal and deadline == float("inf"):
                    _log.info("%s: the trials are asked to save", stop.signal)
                    process.terminate()
                    deadline = time.monotonic() + _STOP_PATIENCE_S
                time.sleep(0.2)
        finally:
            if stop.signal:
                _let_jobs_save(meeting)
            meeting.unlink(missing_ok=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
    return status or 0


@contextmanager
def connect() -> Iterator[float | None]:
    """Starts Ray in the driver, as head of this job's cluster, or connects to the one at the given address.

    Yields the GPUs of the smallest node with any if it connects, else None. Raises UserError if no cluster answers
    or none has a GPU.
    """
    import ray

    address = os.environ.get("CVAE_RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    # Ray passes it to a shell unquoted, and a path may contain a space.
    runtime: dict[str, Any] = {"py_executable": shlex.quote(sys.executable)}
    if address:
        # Its raylets do not have this job's environment.
        variables = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        try:
            ray.init(address=address, runtime_env={**runtime, "env_vars": variables}, **quiet)
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
        head = ray.get_runtime_context().gcs_address
        write_atomically(Path(os.environ["CVAE_RAY_MEETING"]), head)
    try:
        gpus_of_nodes = [node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]]
        if not any(gpus_of_nodes):
            raise UserError(
                f"the Ray cluster at {address} offers no GPU (`ray start --num-gpus=…`)"
            )
        if not address:
            threading.Thread(target=_count_nodes, daemon=True).start()
        yield min(filter(None, gpus_of_nodes)) if address else None
    finally:
        ray.shutdown()


def _count_nodes() -> None:
    """Logs how many nodes take part, once all do or no more are to be expected."""
    import ray

    nodes = int(os.environ.get("CVAE_RAY_NODES", 1))
    deadline = time.monotonic() + _HEAD_PATIENCE_S
    joined = 1
    with suppress(Exception):  # Ray ends
        while joined < nodes and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            joined = sum(node["Alive"] for node in ray.nodes())
        level = logging.INFO if joined == nodes else logging.WARNING
        _log.log(level, "%d of %d nodes joined", joined, nodes)


def _set_node_address(node: int) -> None:
    """Gives Ray this node's address on the route to another node, if the node's own name leads to loopback.

    Without a route to the internet Ray uses what the name resolves to, on many systems 127.0.1.1.
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


def _lend_node(meeting: Path, gpus: int, stop: StopFlag, ray_folder: Path) -> None:
    """Runs a raylet for the head until the head ends."""
    head = _find_head(meeting, stop)
    if head is None:
        return
    command = ["ray.scripts.scripts", "start", f"--address={head}", "--block"]
    command += [f"--num-cpus={max(1, gpus)}", f"--num-gpus={gpus}", "--disable-usage-stats"]
    # The default is the head's folder, which is on the head's node.
    command += ["--object-store-memory=200000000", f"--temp-dir={ray_folder / 'ray'}"]
    if _NODE_ADDRESS in os.environ:
        command.append(f"--node-ip-address={os.environ[_NODE_ADDRESS]}")
    log_file = ray_folder / "start.log"
    with open(log_file, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=_environment(2, meeting, ray_folder),
            preexec_fn=_ignore_warning,
            stdout=log,
            stderr=log,
        )
    try:
        deadline = float("inf")
        while meeting.exists() and _answers(head) and time.monotonic() < deadline:
            if stop.signal:
                deadline = min(deadline, time.monotonic() + _STOP_PATIENCE_S)
            elif process.poll() is not None and meeting.exists():
                print(log_file.read_text(errors="replace"), flush=True)
                raise RuntimeError(
                    f"ray start on {socket.gethostname()} ended with status {process.returncode}:"
                    f" {trouble(ray_folder) or 'without a message'}"
                )
            time.sleep(_POLL_S)
        if stop.signal:
            _let_jobs_save(meeting)
    finally:
        # A raylet that is asked to end drains for half a minute; by now there is nothing to drain.
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
        process.wait()


def _ignore_warning() -> None:
    """SLURM warns every process of the time limit by SIGUSR2, which by default ends it."""
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
    """Waits for the head and returns its address; None after a signal. Raises RuntimeError if none comes."""
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


def trouble(folder: Path) -> str:
    """Returns the last line about an error in Ray's logs, with its file; "" if there is none."""
    logs = [file for pattern in ("*.err", "*.out", "*.log") for file in folder.rglob(pattern)]
    for file in sorted(logs, key=_relevance, reverse=True):
        lines = [_LOG_HEADER.sub("", line).strip() for line in _end_of(file).splitlines()]
        errors = [line for line in lines if _TROUBLE.search(line)]
        if errors:
            return f"{errors[-1][:300]} ({file.name})"
    return ""


def _relevance(file: Path) -> tuple[bool, bool, float]:
    """The output of `ray start` comes first, then what was written to standard error, the newest first."""
    try:
        return file.name == "start.log", file.suffix == ".err", file.stat().st_mtime
    except OSError:
        return False, False, 0.0


def _end_of(file: Path) -> str:
    with suppress(OSError), open(file, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 10_000))
        return log.read().decode(errors="replace")
    return ""
