"""The mirror against a real `mlflow server` on loopback, which is stopped and cut off."""

import base64
import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvae.errors import UserError
from cvae.tracking import mlflow_mirror
from cvae.tracking.mlflow_mirror import behind, start_mirror, sync
from tests.helpers.mlflow_runs import Server

mlflow_mirror.prepare_mlflow()

from mlflow.tracking import MlflowClient  # noqa: E402

from cvae.tracking.mlflow_push import Pusher  # noqa: E402
from tests.helpers.mlflow_runs import Run, each_once, images, points  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests of this file; `wait` before use."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


class Proxy:
    """Passes requests on. With a login it refuses those without; else it cuts connections instead of answering."""

    def __init__(self, port: int, login: str | None = None) -> None:
        self._target = port
        self._login = login and base64.b64encode(login.encode())
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.cut: list[bytes] = []
        self._seen: dict[bytes, int] = {}
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                with client, socket.create_connection(("127.0.0.1", self._target)) as server:
                    self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            request += client.recv(65536)
        head, _, body = request.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        while length and len(body) < int(length[1]):
            body += client.recv(65536)
        if self._login and f"Basic {self._login.decode()}".encode() not in head:
            client.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 4\r\n\r\nwho?")
            return
        # One request a connection, so that the end of the answer is the end of the connection.
        head = re.sub(rb"(?i)connection: [^\r]*", b"Connection: close", head)
        server.sendall(head + b"\r\n\r\n" + body)
        answer = b""
        while block := server.recv(65536):
            answer += block
        line = head.partition(b"\r\n")[0]
        call = line.split(b"?")[0]
        self._seen[call] = self._seen.get(call, 0) + 1
        if self._login is None and not line.startswith(b"GET") and self._seen[call] % 3 == 1:
            self.cut.append(line)
        else:
            client.sendall(answer)


def test_a_connection_cut_after_the_server_has_done_it(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.wait()
    cutter = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{cutter.port}")
    run = Run(home, "cut")
    run.steps(*range(1, 700))
    run.picture(5)
    run.end()
    pusher = Pusher(run.path)
    for _ in range(100):
        with contextlib.suppress(Exception):
            pusher.push()
            break
    cut = b" ".join(cutter.cut)
    for call in (b"runs/create", b"runs/log-batch", b"runs/log-inputs", b"PUT"):
        assert call in cut
    assert behind(run.path) == 0
    assert points(server.database, run) == each_once(*range(1, 700))
    client = MlflowClient(server.url)
    assert len(images(client, run)) == 2
    shown = client.get_run(run.run_id)
    assert (shown.info.status, len(shown.inputs.dataset_inputs)) == ("FINISHED", 1)
    runs = client.search_runs([shown.info.experiment_id], "attributes.run_name = 'cut'")
    assert len(runs) == 1


@pytest.mark.parametrize("way", ["address", "variables"])
def test_a_password_opens_the_server_and_is_written_nowhere(
    server: Server,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    server.wait()
    host = f"127.0.0.1:{Proxy(server.port, login='ann:s3cr3tpw').port}"
    run = Run(home, f"secret by {way}")
    run.steps(1, 2)
    run.picture(2)
    run.end()

    def log_in(password: str) -> None:
        if way == "address":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:{password}@{host}")
        else:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{host}")
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    log_in("wr0ngpw")
    with pytest.raises(UserError, match=r"does not take the run.*401") as caught:
        sync(run.path, lambda lines: None)
    assert "wr0ngpw" not in str(caught.value)
    log_in("s3cr3tpw")
    with caplog.at_level(logging.DEBUG, logger="cvae"):
        sync(run.path, lambda lines: None)
    assert points(server.database, run) == each_once(1, 2)
    forms = [b"s3cr3tpw", b"wr0ngpw", base64.b64encode(b"ann:s3cr3tpw")]
    files = [*home.rglob("*"), *server.folder.rglob("*")]
    for content in [caplog.text.encode(), *(x.read_bytes() for x in files if x.is_file())]:
        assert not [form for form in forms if form in content]


def test_server_stopped_in_mid_run_and_started_again(
    server: Server, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server.wait()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    run, unlucky = Run(home, "patient"), Run(home, "unlucky")
    mirror = start_mirror(run.path)
    run.steps(*range(1, 200))
    while behind(run.path):
        time.sleep(0.1)

    server.kill()
    run.steps(*range(200, 400))
    run.picture(300)
    unlucky.steps(1, 2, 3)
    unlucky.end()
    late = start_mirror(unlucky.path)
    started = time.monotonic()
    assert late.finish(2.0) == 5
    assert time.monotonic() - started < 4
    with pytest.raises(UserError, match="does not take the run"):
        sync(unlucky.path, lambda lines: None)
    while "MLflow is away" not in run.log:
        time.sleep(0.1)

    server.start()
    server.wait()
    sync(unlucky.path, lambda lines: None)
    run.steps(*range(400, 500))
    while "MLflow is back" not in run.log:
        time.sleep(0.1)
    assert run.log.count("MLflow is away") == 1
    with pytest.raises(UserError, match="its mirror is at work"):
        sync(run.path, lambda lines: None)
    assert mirror._process is not None
    mirror._process.kill()
    mirror._process.wait()
    run.steps(*range(500, 600))
    run.end()
    with caplog.at_level(logging.WARNING):
        assert mirror.finish(180) == 0, run.log
    assert "had died" in caplog.text

    assert points(server.database, run) == each_once(*range(1, 600))
    assert points(server.database, unlucky) == each_once(1, 2, 3)
    client = MlflowClient(server.url)
    assert len(images(client, run)) == 2
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert client.get_run(unlucky.run_id).info.status == "FINISHED"
