"""Work in parts, each visible by rename once it is finished, so that a restart repeats the others only.

Which process fills a part changes none of its bytes.
"""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from numpy.typing import NDArray
from tqdm import tqdm

from cvae.errors import UserError
from cvae.files.paths import write_atomically
from cvae.preparation.store_writer import save_array
from cvae.progress import progress_bar

_log = logging.getLogger(__name__)
Task = TypeVar("Task")


@dataclass(frozen=True)
class Parts(ABC):
    """Items of a split that are converted in parts: part n is items [n * part, (n + 1) * part)."""

    folder: Path
    items: list[str]
    part: int
    unit: ClassVar[str]
    suffix: ClassVar[str]
    """Suffix of the file that marks a part as finished."""

    @property
    def total(self) -> int:
        return -(-len(self.items) // self.part)

    def unfinished(self) -> list[int]:
        # One listing, which network file systems answer afresh, instead of a query for each file.
        names = set(os.listdir(self.folder))
        return [n for n in range(self.total) if self.path(n, self.suffix).name not in names]

    def path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:05}{suffix}"

    def items_of(self, number: int) -> list[str]:
        return self.items[number * self.part : (number + 1) * self.part]

    @abstractmethod
    def fill(self, numbers: Sequence[int], bar: "tqdm[Any]") -> None:
        """Converts these parts; the bar counts items."""

    def fill_rest(self, title: str) -> None:
        """Converts the unfinished parts in this process and its workers, with a progress bar."""
        numbers = self.unfinished()
        done = len(self.items) - sum(len(self.items_of(number)) for number in numbers)
        with progress_bar(len(self.items), self.unit, title, done) as bar:
            self.fill(numbers, bar)


def parts_folder(folder: Path, made_from: Mapping[str, Any]) -> None:
    """Makes `folder` hold only parts made from these settings; removes parts of other settings.

    Removes also what killed processes left unfinished, so no other process may be writing there.
    """
    settings = json.dumps(made_from, indent=1, sort_keys=True)
    marker = folder / "made_from.json"
    # Everything below .preparing is ours, even if a killed removal has already deleted the marker.
    if ".preparing" not in folder.parts and not marker.exists() and any(folder.glob("[!.]*")):
        raise UserError(f"{folder} is not empty and is not ours to overwrite; move it away first")
    if folder.exists() and not (marker.exists() and marker.read_text("utf-8") == settings):
        _log.warning("%s was begun with other settings: starting it over", folder.name)
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(".*"):
        file.unlink(missing_ok=True)
    if not marker.exists():
        write_atomically(marker, settings)


def save_part(path: Path, array: NDArray[Any]) -> None:
    """Writes a part, which a job that was believed dead may be writing at the same time."""
    temporary = path.with_name(f".{socket.gethostname()}-{os.getpid()}-{path.name}")
    save_array(temporary, array)
    os.replace(temporary, path)


def run_parallel(function: Callable[[Task], int], tasks: Sequence[Task], bar: "tqdm[Any]") -> None:
    """Calls an importable function with every task, in one process per core of this process.

    The bar advances by what the function returns. Raises the first exception of a call.
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
        message = "a worker process was killed, perhaps for want of memory; start again to go on"
        raise UserError(message) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Returns the cores this process is bound to or, if it is bound to none, its rank's share."""
    usable = len(os.sched_getaffinity(0))
    if usable < (os.cpu_count() or 1):
        return usable
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent killed by SIGKILL cannot stop its workers.
    threading.Thread(target=exit_with_parent, daemon=True).start()
