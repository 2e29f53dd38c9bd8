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
    asked: str | None = parser.parse_args(arguments).port
    uri = paths.tracking_uri()
    if uri.startswith(("http:", "https:")):
        print(f"MLFLOW_TRACKING_URI names a server that is there already: {without_password(uri)}")
        return 0
    port = _port(asked)
    # MLflow's import takes seconds: not before a port is known to be free.
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


def _port(asked: str | None) -> int:
    """The one that was asked for, or the first that is free. Raises UserError if there is none."""
    if asked is not None and not (
        asked.isascii() and asked.isdecimal() and len(asked) < 6 and 0 < int(asked) < 2**16
    ):
        raise UserError(f"PORT={cut(asked, 50)}: a port is a whole number from 1 to 65535")
    for port in [int(asked)] if asked else range(_FIRST_PORT, _FIRST_PORT + _PORTS):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    if asked:
        raise UserError(f"port {asked} is taken or not allowed; another one: make mlflow PORT=…")
    raise UserError(f"no port from {_FIRST_PORT} on is free; name one: make mlflow PORT=…")


def _start(uri: str, port: int) -> "subprocess.Popen[bytes]":
    mlflow = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"
    environment = {
        **os.environ,
        # Not on the command line, which every user of this host can read: there may be a password in it.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [mlflow, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    files = ["--artifacts-destination", (paths.home() / "mlruns").as_uri()]
    return subprocess.Popen([*command, *files], env=environment)


def _wait_for(server: "subprocess.Popen[bytes]", port: int) -> None:
    """Returns when our own server listens, not a stranger's on that port. Raises UserError if it does not."""
    deadline = time.monotonic() + _PATIENCE_S
    while not _listens(server.pid, port):
        if server.poll() is not None or time.monotonic() > deadline:
            raise UserError(
                f"MLflow does not serve on port {port}; try another: make mlflow PORT=…"
            )
        time.sleep(0.3)


def _listens(pid: int, port: int) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                for link in one.net_connections("tcp"):
                    if link.status == psutil.CONN_LISTEN and link.laddr.port == port:
                        return True
    return False


def _facts(uri: str, port: int) -> list[tuple[str, str]]:
    from mlflow.tracking import MlflowClient

    address = f"http://127.0.0.1:{port}"
    found = MlflowClient(tracking_uri=uri).search_experiments(max_results=_EXPERIMENTS_SHOWN + 2)
    named = [one for one in found if one.name != "Default"]
    links = [
        (printable(one.name), f"{address}/#/experiments/{one.experiment_id}/runs") for one in named
    ]
    if len(named) > _EXPERIMENTS_SHOWN:
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
