"""Reads large rows of a file with several threads at once.

A memory map reads one page after another when each is touched, which on a cold network file system takes
many round trips per large image.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# From this size on (146² pixels in colour) reading is as fast as a map whose pages are in memory.
LARGE = 64 << 10
_THREADS = 16


class RowReader:
    """Rows of a C-contiguous uint8 array of this shape that begins at `offset` of a file."""

    def __init__(self, file: Path, offset: int, shape: tuple[int, ...]) -> None:
        self._file = file.open("rb", buffering=0)
        self._offset, self._shape = offset, shape[1:]
        self._row_bytes = int(np.prod(self._shape))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="rows")

    def take(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns uint8 (B, *shape[1:]). Raises OSError if the file cannot be read or was truncated."""
        rows = np.empty((len(indices), self._row_bytes), np.uint8)
        list(self._pool.map(self._read, rows, indices.tolist()))
        return rows.reshape(len(indices), *self._shape)

    def _read(self, row: NDArray[np.uint8], index: int) -> None:
        done, start = 0, self._offset + index * self._row_bytes
        while done < self._row_bytes:
            count = os.preadv(self._file.fileno(), [row[done:].data], start + done)
            if count == 0:
                raise OSError(f"{self._file.name} has become shorter")
            done += count
