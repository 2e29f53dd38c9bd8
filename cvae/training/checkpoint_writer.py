"""Writes checkpoints in the background: training waits for a copy in memory, a thread writes it to disk."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvae.errors import UserError
from cvae.run import checkpoint
from cvae.run.checkpoint import TrainingState


class CheckpointWriter:
    """Writes one checkpoint after the other; a second one never overtakes the first.

    report: is called from the writing thread after each write with step, path, best, stall_s (how long training
    waited) and write_s; after a failed one with step and error (the OSError's message).
    """

    def __init__(self, folder: Path, report: Callable[[dict[str, Any]], None]):
        self.folder, self.report = folder, report
        self.best = float("inf")
        """The lowest validation loss of the checkpoints that have been written."""
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: TrainingState, keep: int, best: bool) -> None:
        """Calls checkpoint.save() in the background; returns as soon as the tensors may change again."""
        began = time.perf_counter()
        self.wait()
        copied = self._copied(state)
        stall_s = time.perf_counter() - began
        # Not a daemon: Python's exit waits for it.
        self._writing = threading.Thread(
            target=self._write, args=(copied, keep, best, stall_s), name="checkpoint"
        )
        self._writing.start()

    def finish(self) -> None:
        """Waits for the last write. Raises the error that it ended in, OSError for a full disk.

        Raises UserError if there is no checkpoint at all: a second attempt would start from step 0 and end here.
        """
        self.wait()
        if self._error is not None and not checkpoint.steps(self.folder):
            raise UserError(
                f"no checkpoint could be written to {self.folder} ({self._error}), so that nothing is left of"
                " this training; give the disk room or raise the limit on files (ulimit -f), then resume"
            )
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Waits until nothing is being written, whether that succeeded or not."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _copied(self, state: TrainingState) -> TrainingState:
        """Returns a copy in host memory that is reused: allocating a gigabyte costs more than copying it."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for part, contents in state.tensors.items():
            tensors[part] = {}
            for name, value in contents.items():
                buffer = self._buffers.get((part, name))
                if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                    pinned = value.device.type == "cuda"
                    buffer = torch.empty_like(value, device="cpu", pin_memory=pinned)
                    self._buffers[part, name] = buffer
                tensors[part][name] = buffer.copy_(value.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return state._replace(tensors=tensors)

    def _write(self, state: TrainingState, keep: int, best: bool, stall_s: float) -> None:
        step, began = state.state["step"], time.perf_counter()
        try:
            path = checkpoint.save(self.folder, state, keep, best)
        except Exception as error:  # for a full disk safetensors raises an exception of its own
            self._error = error
            self.report({"step": step, "error": str(error)})
            return
        self._error = None
        if best:
            self.best = state.state["best_val_loss"]
        times = {"stall_s": stall_s, "write_s": time.perf_counter() - began}
        self.report({"step": step, "path": path, "best": best, **times})
