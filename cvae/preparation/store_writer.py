"""Writes a store so that a preparation that is killed at any moment can be continued.

A store is built in <store>/.preparing. Its new manifest is written there when everything else is
complete; installing it then takes renames only, which the next start completes. The store's own
manifest.json is renamed last.
"""

import errno
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cvae.data.store import MANIFEST, FileEntry, Manifest, Store
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.files.file_lock import file_lock
from cvae.files.paths import write_atomically
from cvae.progress import progress_bar

_log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    store: Store
    made: bool
    """False if the store was already complete."""


@contextmanager
def building(store: Path) -> Iterator[Path]:
    """Yields the folder in which to build the store, to one process at a time.

    First completes an interrupted installation. Raises UserError if another process prepares the store
    or if something else is in its place.
    """
    folder = store / ".preparing"
    _check_place(store)
    with locked(store):
        if (folder / MANIFEST).exists():
            _install(folder, store)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            with suppress(OSError):  # removes them only if they are empty
                folder.rmdir()
                store.rmdir()


def _check_place(store: Path) -> None:
    """Raises UserError unless `store` is absent or a folder of a store or of its splits."""
    if os.path.lexists(store) and not store.is_dir():
        raise UserError(
            f"{store} is not a folder, but the place of a prepared store; remove it first"
        )
    names = os.listdir(store) if store.is_dir() else []
    foreign = [name for name in sorted(names) if not (store / name / "images.npy").exists()]
    if foreign and not {MANIFEST, ".preparing"} & set(names):
        raise UserError(f"{store} holds {foreign[0]}, but no prepared store; move it away first")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from preparing `path`, until the block or the process ends.

    Raises UserError if another process holds the lock, or if the disk is full within the block.
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


def write_array(
    path: Path, shape: tuple[int, ...], dtype: str, blocks: Iterable[NDArray[Any]]
) -> None:
    """Writes an .npy file from blocks of rows; it may be larger than memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            # ndarray.tofile() would hide errno, and with it that the disk is full.
            file.write(np.ascontiguousarray(block, dtype).data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_array(path: Path, array: NDArray[Any]) -> None:
    write_array(path, array.shape, array.dtype.str, [array])


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Returns the size and checksum of every file in a split's folder, by name."""
    sizes = {
        path: path.stat().st_size
        for path in sorted(folder.rglob("*"))
        # Killed processes leave files that begin with a dot.
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
    """Returns the manifest of an existing store without those of `splits` whose files are damaged."""
    if not (path / MANIFEST).exists():
        return None
    store = Store(path)
    present = [split for split in splits if split in store.manifest.splits]
    total = sum(e.bytes for name in present for e in store.manifest.splits[name].files.values())
    with progress_bar(total, "B", f"{path.name}: check", delay=2) as bar:
        for split in present:
            try:
                store.verify(split, bar.update)
            except UserError as error:
                _log.warning("%s; preparing split %s anew", error, split)
                del store.manifest.splits[split]
    return store.manifest


def commit(folder: Path, store: Path, manifest: Manifest) -> Store:
    """Installs the splits that were built in <folder>/<split>/ as the store of this manifest."""
    write_atomically(folder / MANIFEST, manifest.to_json())
    _install(folder, store)
    return Store(store)


def _install(folder: Path, store: Path) -> None:
    for split, content in Store(folder).manifest.splits.items():
        for name in content.files:
            # It is absent if an earlier preparation, or this one before a kill, has installed it.
            if (folder / split / name).exists():
                (store / split / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / split / name, store / split / name)
    os.replace(folder / MANIFEST, store / MANIFEST)
    shutil.rmtree(folder)
