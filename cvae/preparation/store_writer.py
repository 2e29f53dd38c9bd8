"""How a store comes into being, whatever kills its making: lock, parts, one commit, install.

While a store is made everything lies in <store>/.preparing. Work is cut into parts, each visible by
rename once it is done, so that a restart redoes unfinished parts only. When all is there the new
manifest is written into .preparing: from then on the store is as good as made, and installing it
is renames alone, which a restart completes. The store's own manifest.json is the last of them.
"""

import contextlib
import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cvae.data.store import MANIFEST, FileEntry, Manifest, Store
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.files.file_lock import file_lock
from cvae.files.paths import write_atomically
from cvae.progress import progress_bar


class Prepared(NamedTuple):
    store: Store
    made: bool  # False: all of it was there already


log = logging.getLogger(__name__)
Task = TypeVar("Task")


@contextmanager
def building(store: Path) -> Iterator[Path]:
    """The folder to build the store in, for one process at a time.

    Raises UserError when another process is at it. An install that was cut short is completed.
    """
    folder = store / ".preparing"
    check_place(store)
    with locked(store):
        if (folder / MANIFEST).exists():
            _install(folder, store)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # what was refused at once leaves no empty folders
                folder.rmdir()
                store.rmdir()


def check_place(store: Path) -> None:
    """Raises UserError unless nothing is at `store`, or a folder that holds nothing but a store or its splits."""
    if os.path.lexists(store) and not store.is_dir():
        raise UserError(
            f"{store} is not a folder; a prepared store would take its place: remove it first"
        )
    names = os.listdir(store) if store.is_dir() else []
    strange = [name for name in sorted(names) if not (store / name / "images.npy").exists()]
    if strange and not {MANIFEST, ".preparing"} & set(names):
        raise UserError(
            f"{store} holds {strange[0]}, but no store that prepare.py made; move it away first"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from making `path`; the lock ends with the process, however it ends.

    Raises UserError when another process holds it, and when the disk is found full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent / f".{path.name}.lock"
    with file_lock(lock, refusal=f"{path} is being prepared by another process just now"):
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"the disk of {path} is full; what is finished is kept: make room and start again"
            ) from None


def parts_folder(folder: Path, made_from: Mapping[str, Any]) -> Path:
    """`folder`, holding parts made from just these settings: parts of other settings are removed.

    Also removed is what killed writers left unfinished; so nobody else may be at work in it.
    """
    settings = json.dumps(made_from, indent=1, sort_keys=True)
    marker = folder / "made_from.json"
    # Below .preparing all is ours, even where a killed removal has taken the marker first.
    if ".preparing" not in folder.parts and not marker.exists() and any(folder.glob("[!.]*")):
        raise UserError(
            f"{folder} is not empty, and was not made by prepare.py; move it away first"
        )
    if folder.exists() and not (marker.exists() and marker.read_text("utf-8") == settings):
        log.warning("%s was begun with other settings: starting it over", folder.name)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(".*"):
        file.unlink(missing_ok=True)
    if not marker.exists():
        write_atomically(marker, settings)
    return folder


def part_path(folder: Path, number: int, suffix: str) -> Path:
    return folder / f"{number:05}{suffix}"


def unfinished(folder: Path, suffix: str, total: int) -> list[int]:
    """Numbers of the parts, out of `total`, that nobody has finished."""
    # One listing, which network file systems answer afresh, instead of a question for each file.
    there = set(os.listdir(folder))
    return [n for n in range(total) if part_path(folder, n, suffix).name not in there]


def save_part(path: Path, array: NDArray[Any]) -> None:
    """Writes a part that others, of a job that was thought dead, may be writing just now, too."""
    own = path.with_name(f".{socket.gethostname()}-{os.getpid()}-{path.name}")
    save_array(own, array)
    os.replace(own, path)


def run_parallel(function: Callable[[Task], int], tasks: Sequence[Task], bar: "tqdm[Any]") -> None:
    """Calls function with every task, in as many processes as this one has cores.

    function: importable, returns by how much the bar advances. Its first exception is raised here.
    """
    if not tasks:
        return
    workers = min(len(tasks), cores())
    # spawn: a forked child would hold our lock and torch's threads in unknown states.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        for done in as_completed([pool.submit(function, task) for task in tasks]):
            bar.update(done.result())
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; start again to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Cores of this process: those it is bound to, or its rank's share where it is bound to none."""
    usable = len(os.sched_getaffinity(0))
    if usable < (os.cpu_count() or 1):
        return usable
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent that was killed by SIGKILL cannot tell its workers to stop.
    threading.Thread(target=follow_parent, daemon=True).start()


def write_array(
    path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[NDArray[Any]]
) -> None:
    """Writes an .npy file whose rows come in blocks; it may be larger than memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            # not tofile(): it hides the errno, and with it that the disk is full
            file.write(np.ascontiguousarray(block, dtype).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_array(path: Path, array: NDArray[Any]) -> None:
    write_array(path, array.shape, array.dtype.str, [array])


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Length and checksum of every file of a split's folder, by name."""
    sizes = {
        path: path.stat().st_size
        for path in sorted(folder.rglob("*"))
        # A leading dot: what a killed writer left.
        if path.is_file() and not path.name.startswith(".")
    }
    with progress_bar(sum(sizes.values()), "B", f"{folder.name}: checksums", delay=2) as bar:
        return {
            path.relative_to(folder).as_posix(): FileEntry(
                bytes=size, sha256=sha256_of_file(path, bar.update)
            )
            for path, size in sizes.items()
        }


def intact_manifest(path: Path, splits: Iterable[str]) -> Manifest | None:
    """The manifest of the store that is there, without those of `splits` whose files are damaged."""
    if not (path / MANIFEST).exists():
        return None
    store = Store(path)
    have = [split for split in splits if split in store.manifest.splits]
    total = sum(e.bytes for name in have for e in store.manifest.splits[name].files.values())
    with progress_bar(total, "B", f"{path.name}: check", delay=2) as bar:
        for split in have:
            try:
                store.verify(split, bar.update)
            except UserError as error:
                log.warning("%s; preparing split %s anew", str(error).partition(";")[0], split)
                del store.manifest.splits[split]
    return store.manifest


def commit(folder: Path, store: Path, manifest: Manifest) -> Store:
    """Turns what was built, in <folder>/<split>/, into the store that the manifest describes."""
    write_atomically(folder / MANIFEST, manifest.to_json())
    _install(folder, store)
    return Store(store)


def _install(folder: Path, store: Path) -> None:
    for split, content in Store(folder).manifest.splits.items():
        for name in content.files:
            # Absent: it was installed before, by an earlier preparation or before a kill.
            if (folder / split / name).exists():
                (store / split / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / split / name, store / split / name)
    os.replace(folder / MANIFEST, store / MANIFEST)
    shutil.rmtree(folder)
