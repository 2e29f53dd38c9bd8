"""MLflow's UI on the project's own store, for this machine alone: `make mlflow`."""

import os
import shutil
import socket
import sys
from typing import NoReturn

from cvae import command_line, paths
from cvae.command_line import Parser
from cvae.errors import UserError

PORT = 5000


def main(arguments: list[str]) -> int:
    Parser(prog="mlflow_ui.py", description=__doc__).parse_args(arguments)
    uri = paths.tracking_uri()
    if uri.startswith(("http:", "https:")):
        print(f"MLFLOW_TRACKING_URI names a server that is there already: {uri}")
        return 0
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            raise UserError(
                f"port {PORT} is taken; perhaps MLflow runs already: http://127.0.0.1:{PORT}"
            )
    # MLflow's import takes seconds: not before the port is known to be free.
    from cvae.training.mlflow_store import create_store

    create_store(uri)
    print(f"MLflow: http://127.0.0.1:{PORT}   (ready in some seconds; Ctrl-C ends it)", flush=True)
    return _serve(uri)


def _serve(uri: str) -> NoReturn:
    """MLflow becomes this process: Ctrl-C and signals reach it as if it had been started by hand."""
    mlflow = shutil.which("mlflow", path=os.path.dirname(sys.executable)) or "mlflow"
    os.environ |= {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [mlflow, "server", "--host", "127.0.0.1", "--port", str(PORT), "--workers", "1"]
    store = ["--backend-store-uri", uri]
    files = ["--artifacts-destination", (paths.home() / "mlruns").as_uri()]
    os.execv(mlflow, [*command, *store, *files])


if __name__ == "__main__":
    command_line.run(main)
