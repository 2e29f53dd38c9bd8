"""Encoders of a hub on the loopback that answers as the Hugging Face hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.conftest import PROJECT_ROOT

COMMIT = "86b5e0934494bd15c9632b12f734a8a67f723594"


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_GET(self) -> None:
        self.answer(self.path.partition("?")[0], body=True)

    def do_HEAD(self) -> None:
        self.answer(self.path.partition("?")[0], body=False)

    def answer(self, path: str, body: bool) -> None:
        headers, content = {}, b""
        if path.startswith("/api/models/acme/tiny/tree"):
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data)}
                for name, data in self.files.items()
            ]
            content = json.dumps(rows).encode()
        elif path.startswith("/api/models/acme/tiny"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/acme/tiny/resolve/"):
            content = self.files[path.rpartition("/")[2]]
            headers = {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": COMMIT}
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def ask(home: Path, url: str) -> subprocess.CompletedProcess[str]:
    """Where acme/tiny is, its revision and its files, in a process that knows nothing yet."""
    code = "import os; from cvae.data.encoder_files import *; f = encoder_folder('acme/tiny'); "
    code += "print(revision(f), *sorted(os.listdir(f)))"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT_ROOT,
        env={**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )


def test_a_hub_model_is_fetched_once_and_then_needs_no_network(tmp_path: Path) -> None:
    unwanted = {
        "README.md": b"read",
        "pytorch_model.bin": b"the same weights",
        "tf_model.h5": b"tf",
    }
    Hub.files = {"config.json": b"{}", "vocab.txt": b"a", "model.safetensors": b"b", **unwanted}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        first = ask(tmp_path, url)
        server.shutdown()
    assert first.stdout == f"{COMMIT} config.json model.safetensors vocab.txt\n", first.stderr
    assert ask(tmp_path, url).stdout == first.stdout

    next(tmp_path.rglob("model.safetensors")).unlink()  # as after a download that was killed
    cut = ask(tmp_path, url)
    assert "is neither here nor to be had" in cut.stderr
