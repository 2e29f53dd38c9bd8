"""Large rows of a file, read by several threads at once.

A memory map reads a page when it is touched, one after the other: from a cold file system on the network that is
many round trips for each large image.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# From here on (146 pixels squared in colour) reading is as fast as a map whose pages are in memory.
LARGE = 64 << 10
_THREADS = 16


class RowReader:
    """Rows of a C-contiguous uint8 array that begins at `offset` of a file. shape: of the array."""

    def __init__(self, file: Path, offset: int, shape: tuple[int, ...]) -> None:
        self._file = file.open("rb", buffering=0)
        self._offset, self._shape = offset, shape[1:]
        self._row = int(np.prod(self._shape))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="rows")

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns uint8 (B, *shape[1:]). Raises OSError if the file cannot be read, or has become shorter."""
        rows = np.empty((len(indices), self._row), np.uint8)
        list(self._pool.map(self._read, rows, indices.tolist()))
        return rows.reshape(len(indices), *self._shape)

    def _read(self, row: NDArray[np.uint8], index: int) -> None:
        done, place = 0, self._offset + index * self._row
        while done < self._row:
            count = os.preadv(self._file.fileno(), [row[done:].data], place + done)
            if count == 0:
                raise OSError(f"{self._file.name} has become shorter")
            done += count
