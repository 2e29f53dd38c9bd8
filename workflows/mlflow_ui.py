"""MLflow's UI on the project's own store, for this machine alone: `make mlflow`, or `make mlflow PORT=6000`."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil

from cvae import command_line
from cvae.command_line import Parser
from cvae.errors import UserError, cut
from cvae.files import paths
from cvae.files.paths import printable
from cvae.redaction import without_password
from workflows.terminal.formatting import aligned

_FIRST_PORT, _PORTS = 5000, 50
_PATIENCE_S = 90.0
_EXPERIMENTS_SHOWN = 8


def main(arguments: list[str]) -> int:
    parser = Parser(prog="mlflow_ui.py", description=__doc__)
    parser.add_argument("port", nargs="?", metavar="PORT", help="default: the first that is free")
    requested: str | None = parser.parse_args(arguments).port
    uri = paths.tracking_uri()
    if uri.startswith(("http:", "https:")):
        print(f"MLFLOW_TRACKING_URI names a running server: {without_password(uri)}")
        return 0
    port = _port(requested)
    # Only now, since importing MLflow takes seconds.
    from cvae.tracking.mlflow_store import create_store

    create_store(uri)
    server = _start(uri, port)
    try:
        _wait_for(server, port)
        print(aligned(_facts(uri, port)), flush=True)
        return server.wait()
    except KeyboardInterrupt:
        return 130
    finally:
        server.terminate()
        server.wait()


def _port(requested: str | None) -> int:
    """Returns the requested port, by default the first free one. Raises UserError if it is not free."""
    number = requested or ""
    if requested is not None and not (
        number.isascii() and number.isdecimal() and len(number) < 6 and 0 < int(number) < 2**16
    ):
        raise UserError(f"PORT={cut(number, 50)}: a port is a whole number from 1 to 65535")
    for port in [int(number)] if number else range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    if number:
        raise UserError(f"port {number} is taken or not allowed; another one: make mlflow PORT=…")
    raise UserError(f"no port from {_FIRST_PORT} on is free; name one: make mlflow PORT=…")


def _start(uri: str, port: int) -> "subprocess.Popen[bytes]":
    mlflow = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"
    environment = {
        **os.environ,
        # The URI may contain a password, and every user of this host can read command lines.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    artifacts = (paths.home() / "mlruns").as_uri()
    command = [mlflow, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return subprocess.Popen([*command, "--artifacts-destination", artifacts], env=environment)


def _wait_for(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Returns once the server listens. Raises UserError if it ends or does not listen in time."""
    deadline = time.monotonic() + _PATIENCE_S
    while not _listens(server.pid, port):
        if server.poll() is not None or time.monotonic() > deadline:
            raise UserError(
                f"MLflow does not serve on port {port}; try another: make mlflow PORT=…"
            )
        time.sleep(0.3)


def _listens(pid: int, port: int) -> bool:
    """Returns whether the process or a child listens; a stranger's server on the port does not count."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                for socket_ in member.net_connections("tcp"):
                    if socket_.status == psutil.CONN_LISTEN and socket_.laddr.port == port:
                        return True
    return False


def _facts(uri: str, port: int) -> list[tuple[str, str]]:
    """Returns what the terminal shows: addresses of the server and of the newest experiments."""
    from mlflow.tracking import MlflowClient

    address = f"http://127.0.0.1:{port}"
    client = MlflowClient(tracking_uri=uri)
    experiments = client.search_experiments(max_results=_EXPERIMENTS_SHOWN + 2)
    links = [
        (printable(one.name), f"{address}/#/experiments/{one.experiment_id}/runs")
        for one in experiments
        if one.name != "Default"
    ]
    if len(links) > _EXPERIMENTS_SHOWN:
        links[_EXPERIMENTS_SHOWN:] = [("all others", f"{address}/#/experiments")]
    tunnel = f"ssh -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"
    return [
        ("MLflow", f"{address}   (Ctrl-C ends it)"),
        *links,
        ("from elsewhere", tunnel),
        ("note", "whoever has an account on this host can open it"),
    ]


if __name__ == "__main__":
    command_line.run(main)
