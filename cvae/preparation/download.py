"""Downloads files: resumes what broke off, checks it, and names it once it is complete."""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cvae.errors import UserError
from cvae.files.checksums import md5_of_file
from cvae.progress import progress_bar

_TIMEOUT_S = 30
_BLOCK = 1 << 16
_TRIES = 4  # in a row without a byte; the waits between them double, from a second on
T = TypeVar("T")


class _ConnectionLost(Exception):
    def __init__(self, reason: object, final: bool = False):
        super().__init__(str(reason))
        self.final = final


def fetch(url: str, path: Path, md5: str, instead: str) -> None:
    """Downloads `url` to `path` unless the file exists; continues what an earlier call has downloaded.

    Lost connections are restored. instead: advice for a person without network. Raises UserError if the
    server cannot be reached or sends a file with another MD5.
    """
    if path.exists():
        return
    partial = partial_file(path)
    fruitless = 0
    while True:
        before = _size(partial)
        try:
            _receive(url, partial)
            break
        except _ConnectionLost as lost:
            fruitless = fruitless + 1 if _size(partial) == before else 0
            # A server that has never answered will hardly do so a second later.
            if lost.final or fruitless >= _TRIES or (fruitless and before == 0):
                kept = "; what came is kept, start again to go on" if _size(partial) else ""
                raise UserError(f"cannot download {url} ({lost}){kept}; {instead}") from None
            time.sleep(2**fruitless)
    if checked_md5(partial) != md5:
        partial.unlink()
        raise UserError(f"{url} is not the published file (its MD5 differs)")
    os.replace(partial, path)


def partial_file(path: Path) -> Path:
    """Returns where fetch keeps the downloaded part of `path`."""
    return path.with_name(f".{path.name}.part")


def checked_md5(path: Path) -> str:
    """Returns the MD5 of a file, with a progress bar if it is large."""
    with progress_bar(_size(path), "B", f"{path.name}: check", delay=2) as bar:
        return md5_of_file(path, bar.update)


def _receive(url: str, partial: Path) -> None:
    """Appends the rest of the file to `partial`. Raises _ConnectionLost if the network fails."""
    start = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = _on_network(lambda: urllib.request.urlopen(request, timeout=_TIMEOUT_S))
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise _ConnectionLost(error.reason, final=error.code < 500) from None
        # Nothing follows what we have: it is complete, or it is another file.
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return
        partial.unlink()
        raise _ConnectionLost("the file on the server is shorter than what was got") from None
    with response:
        if response.status != 206:  # the server sends whole files only
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            partial.open("ab" if start else "wb") as file,
            progress_bar(total or 0, "B", url.rpartition("/")[2], start) as bar,
        ):
            while block := _on_network(lambda: response.read(_BLOCK)):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(partial) < total:
        raise _ConnectionLost("the connection broke off")


def _on_network(call: Callable[[], T]) -> T:
    """Returns call(). Raises _ConnectionLost for errors of the network, unlike those of the disk."""
    try:
        return call()
    except urllib.error.HTTPError:
        raise
    except (http.client.HTTPException, OSError) as error:
        raise _ConnectionLost(getattr(error, "reason", None) or error) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
