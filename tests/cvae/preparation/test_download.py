"""Downloads from a real server on the loopback that breaks connections and knows ranges."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cvae.data.store import open_store
from cvae.errors import UserError
from cvae.preparation import coco_download, download
from cvae.preparation.coco_download import Archive, download_coco
from cvae.preparation.download import fetch, partial_file
from tests.cvae.data.conftest import contents, write_coco
from workflows.prepare import main


class Server(ThreadingHTTPServer):
    """files: by path; breaks: after how many bytes each of the next connections breaks off."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.breaks: list[int] = []
        self.ranges = True
        self.slow = False
        self.requests: list[tuple[str, int]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        range_header = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(range_header.group(1)) if range_header and self.server.ranges else 0
        self.server.requests.append((self.path.rpartition("/")[2], start))
        if start >= len(content) > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if range_header and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if self.server.breaks:
            rest = rest[: self.server.breaks.pop(0)]
        with contextlib.suppress(OSError):
            for first in range(0, len(rest), 4096):
                self.wfile.write(rest[first : first + 4096])
                if self.server.slow:
                    time.sleep(0.002)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_broken_connection_is_taken_up_where_it_broke(server: Server, tmp_path: Path) -> None:
    server.files["x.bin"], server.breaks = CONTENT, [100_000, 0, 1, 65_000]
    fetch(f"{server.url}/x.bin", tmp_path / "x.bin", MD5, "or not")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT
    assert [start for _, start in server.requests] == [0, 100_000, 100_000, 100_001, 165_001]
    fetch(f"{server.url}/x.bin", tmp_path / "x.bin", MD5, "or not")
    assert len(server.requests) == 5
    assert os.listdir(tmp_path) == ["x.bin"]


def test_a_server_that_gives_up_keeps_what_came(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    server.files["x.bin"], server.breaks = CONTENT, [50_000, *[0] * 9]
    with pytest.raises(
        UserError, match=r"\(the connection broke off\); what came is kept.*; or not"
    ):
        fetch(f"{server.url}/x.bin", path, MD5, "or not")
    assert partial_file(path).stat().st_size == 50_000
    server.breaks = []
    fetch(f"{server.url}/x.bin", path, MD5, "or not")
    assert server.requests[-1] == ("x.bin", 50_000)
    assert path.read_bytes() == CONTENT


def test_a_server_without_ranges_sends_it_all_again(server: Server, tmp_path: Path) -> None:
    server.files["x.bin"], server.breaks, server.ranges = CONTENT, [100_000], False
    fetch(f"{server.url}/x.bin", tmp_path / "x.bin", MD5, "or not")
    assert (tmp_path / "x.bin").read_bytes() == CONTENT


def test_all_that_came_before_a_kill_is_asked_for_no_more(server: Server, tmp_path: Path) -> None:
    server.files["x.bin"] = CONTENT
    path = tmp_path / "x.bin"
    partial_file(path).write_bytes(CONTENT)
    fetch(f"{server.url}/x.bin", path, MD5, "or not")
    assert path.read_bytes() == CONTENT
    path.rename(partial_file(path))
    with partial_file(path).open("ab") as file:
        file.write(b"more than there is")
    fetch(f"{server.url}/x.bin", path, MD5, "or not")
    assert path.read_bytes() == CONTENT


def test_another_file_is_refused_and_forgotten(server: Server, tmp_path: Path) -> None:
    server.files["x.bin"] = CONTENT[:-1] + b"x"
    with pytest.raises(UserError, match=r"x.bin is not the published file \(its MD5 differs\)"):
        fetch(f"{server.url}/x.bin", tmp_path / "x.bin", MD5, "or not")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A COCO of its own, whose archives the server has: they are taken for the official ones."""
    root = write_coco(tmp_path / "published", {"train2017": 40, "val2017": 10})
    names = {
        "zips/train2017.zip": ["train2017"],
        "zips/val2017.zip": ["val2017"],
        "annotations/annotations_trainval2017.zip": ["annotations"],
    }
    (root / "annotations" / "instances_val2017.json").write_text("{}")
    for path, folders in names.items():
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for folder in folders:
                archive.writestr(f"{folder}/", "")
                for file in sorted((root / folder).iterdir()):
                    archive.write(file, f"{folder}/{file.name}")
        server.files[path] = content.getvalue()
        published_archive = Archive(
            path, len(content.getvalue()), hashlib.md5(content.getvalue()).hexdigest()
        )
        if folders == ["annotations"]:
            monkeypatch.setattr(coco_download, "ANNOTATIONS", published_archive)
        else:
            monkeypatch.setitem(coco_download.IMAGES, folders[0], published_archive)
    (root / "annotations" / "instances_val2017.json").unlink()  # not unpacked
    return root


def visible(root: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in contents(root).items() if not name.startswith(".download.")
    }


def test_archives_are_fetched_and_unpacked_once(
    server: Server, published: Path, tmp_path: Path
) -> None:
    root = tmp_path / "deep" / "coco"
    server.breaks = [1000, 20_000]
    download_coco(root, ["val2017"], server.url)
    assert sorted(os.listdir(root)) == [".download.lock", "annotations", "val2017"]
    download_coco(root, ["train2017", "val2017"], server.url)
    assert visible(root) == contents(published)
    requests = len(server.requests)
    download_coco(root, ["train2017", "val2017"], server.url)
    assert len(server.requests) == requests
    fetched = {name for name, start in server.requests if start == 0}
    assert fetched == {"train2017.zip", "val2017.zip", "annotations_trainval2017.zip"}


def test_an_archive_that_a_kill_left_is_removed(
    server: Server, published: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(published, tmp_path / "coco"))
    (root / ".download").mkdir()
    (root / ".download" / "val2017.zip").write_bytes(b"unpacked, but not yet removed")
    (root / ".download" / ".train2017.zip.part").write_bytes(b"begun")
    download_coco(root, ["val2017"], server.url)
    assert os.listdir(root / ".download") == [".train2017.zip.part"]


@pytest.mark.usefixtures("home", "published")
def test_one_command_from_nothing_to_a_store(
    server: Server, small_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_coco, "__defaults__", (server.url,))
    arguments = ["--root", str(tmp_path / "coco"), "--size", "16", "--text", small_bert]
    assert main(["coco", *arguments, "--download"]) == 0
    store = open_store("coco", 16)
    assert {name: len(store.split(name)) for name in ("train", "val")} == {"train": 40, "val": 10}


def _download(root: Path, url: str, archives: tuple[Archive, dict[str, Archive]]) -> None:
    coco_download.ANNOTATIONS, coco_download.IMAGES = archives
    download_coco(root, ["train2017", "val2017"], url)


def test_killed_at_any_moment_it_goes_on(server: Server, published: Path, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    archives = (coco_download.ANNOTATIONS, dict(coco_download.IMAGES))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cvae.preparation.test_download"])
    server.slow = True
    sizes = []
    for count in (3, 12, 30, 48):  # of files there, parts of archives counted by 8 kB
        process = context.Process(target=_download, args=(root, server.url, archives))
        process.start()
        while process.is_alive() and _progress(root) < count:
            pass
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        sizes.append(_progress(root))
    assert sizes == sorted(sizes)
    server.slow = False
    download_coco(root, ["train2017", "val2017"], server.url)
    assert visible(root) == contents(published)


def _progress(root: Path) -> int:
    total = 0
    for folder, _, files in os.walk(root):
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                size = os.stat(os.path.join(folder, file)).st_size
                total += size // 8192 if file.endswith((".zip", ".part")) else 2
    return total


def test_archives_that_a_person_placed_are_checked_used_and_left(
    server: Server, published: Path, tmp_path: Path
) -> None:
    root = tmp_path / "coco"
    root.mkdir()
    (root / "val2017.zip").write_bytes(server.files.pop("zips/val2017.zip"))
    download_coco(root, ["val2017"], server.url)
    assert (root / "val2017.zip").exists()
    assert contents(root / "val2017") == contents(published / "val2017")
    shutil.rmtree(root / "val2017")
    (root / "val2017.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"val2017.zip is not the published file"):
        download_coco(root, ["val2017"], server.url)


def test_what_cannot_be_had_is_one_line(
    server: Server, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="fetches train2017 and val2017, not 'val2014'"):
        download_coco(tmp_path / "coco", ["val2014"], server.url)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; it must be the folder"):
        download_coco(tmp_path / "file", ["val2017"], server.url)
    with pytest.raises(
        UserError,
        match=r"Connection refused\); or place annotations_trainval2017.zip from elsewhere",
    ):
        download_coco(tmp_path / "coco", ["val2017"], "http://127.0.0.1:9")
    del server.files["zips/val2017.zip"]
    with pytest.raises(UserError, match=r"cannot download .*val2017.zip \(Not Found\); or place"):
        download_coco(tmp_path / "coco", ["val2017"], server.url)
    huge = Archive("zips/val2017.zip", 10**18, MD5)
    monkeypatch.setitem(coco_download.IMAGES, "val2017", huge)
    with pytest.raises(UserError, match=r"GB free, and 2000000000.0 GB are needed"):
        download_coco(tmp_path / "coco", ["val2017"], server.url)


def test_the_official_archives_are_named() -> None:
    paths = [
        archive.path for archive in (*coco_download.IMAGES.values(), coco_download.ANNOTATIONS)
    ]
    assert paths == [
        "zips/train2017.zip",
        "zips/val2017.zip",
        "annotations/annotations_trainval2017.zip",
    ]
