"""Files from the web: resumed where they were, checked, visible when they are whole."""

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cvae.errors import UserError
from cvae.progress import progress_bar

_TIMEOUT_S = 30
_BLOCK = 1 << 16
_TRIES = 4  # in a row that bring nothing; the waits between them double, from a second on
T = TypeVar("T")


def fetch(url: str, path: Path, md5: str, instead: str) -> None:
    """Fetches `url` to `path`, unless it is there; what an earlier call got of it is kept.

    A connection that breaks is made anew. instead: what a person without network can do. Raises UserError
    when the server cannot be reached, or when what it sends has another MD5.
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
        except _Broken as broken:
            fruitless = fruitless + 1 if _size(partial) == before else 0
            # A server that was never reached will hardly be in a second.
            if broken.final or fruitless >= _TRIES or (fruitless and before == 0):
                kept = "; what came is kept, start again to go on" if _size(partial) else ""
                raise UserError(f"cannot download {url} ({broken}){kept}; {instead}") from None
            time.sleep(2**fruitless)
    if file_md5(partial) != md5:
        partial.unlink()
        raise UserError(f"{url} is not the published file (its MD5 differs)")
    os.replace(partial, path)


def partial_file(path: Path) -> Path:
    """Where fetch keeps what it has of `path`."""
    return path.with_name(f".{path.name}.part")


def file_md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with (
        path.open("rb") as file,
        progress_bar(_size(path), "B", f"{path.name}: check", delay=2) as bar,
    ):
        while block := file.read(1 << 20):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


class _Broken(Exception):
    def __init__(self, reason: object, final: bool = False):
        super().__init__(str(reason))
        self.final = final


def _receive(url: str, partial: Path) -> None:
    """Appends to `partial` what it lacks of the file. Raises _Broken when the connection does not hold."""
    have = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = _heard(lambda: urllib.request.urlopen(request, timeout=_TIMEOUT_S))
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise _Broken(error.reason, final=error.code < 500) from None
        # There is nothing after what we have: it is all, or it is something else.
        if error.headers.get("Content-Range") == f"bytes */{have}":
            return
        partial.unlink()
        raise _Broken("the file on the server is shorter than what was got") from None
    with answer:
        if answer.status != 206:  # a server that only sends files whole
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with (
            partial.open("ab" if have else "wb") as file,
            progress_bar(total or 0, "B", url.rpartition("/")[2], have) as bar,
        ):
            while block := _heard(lambda: answer.read(_BLOCK)):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(partial) < total:
        raise _Broken("the connection broke off")


def _heard(call: Callable[[], T]) -> T:
    """What the call returns; only what goes wrong on the network is _Broken, not a full disk."""
    try:
        return call()
    except urllib.error.HTTPError:
        raise
    except (http.client.HTTPException, OSError) as error:
        raise _Broken(getattr(error, "reason", None) or error) from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
