"""Checkpoints off the critical path: training waits for a copy in memory, a thread writes it to disk."""

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


class Saver:
    """Writes one snapshot after the other; a second one never overtakes the first.

    told: is called, from the writing thread, with what became of each: step, path, best, stall_s (how long
    training stood still), write_s; or step and error (an OSError's words) where it could not be written.
    """

    def __init__(self, folder: Path, told: Callable[[dict[str, Any]], None]):
        self.folder, self.told = folder, told
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._writing: threading.Thread | None = None
        self._error: Exception | None = None
        self.best = float("inf")
        """The lowest validation loss of those checkpoints that have been written."""

    def save(self, snapshot: TrainingState, keep: int, best: bool) -> None:
        """checkpoint.save() in the background; returns as soon as the tensors may change again."""
        began = time.perf_counter()
        self.wait()
        copied = self._copied(snapshot)
        stall_s = time.perf_counter() - began
        # Not a daemon: Python's end waits for it.
        self._writing = threading.Thread(
            target=self._write, args=(copied, keep, best, stall_s), name="checkpoint"
        )
        self._writing.start()

    def finish(self) -> None:
        """Waits for the last write. Raises what kept it from being written, as OSError for a full disk.

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
        """Until nothing is being written, whatever became of it."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None

    def _copied(self, snapshot: TrainingState) -> TrainingState:
        """In host memory that is used again: a fresh gigabyte would cost more than the copying."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for part, contents in snapshot.tensors.items():
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
        return TrainingState(tensors, snapshot.state)

    def _write(self, snapshot: TrainingState, keep: int, best: bool, stall_s: float) -> None:
        step, began = snapshot.state["step"], time.perf_counter()
        try:
            path = checkpoint.save(self.folder, snapshot, keep, best)
            self._error = None
            if best:
                self.best = snapshot.state["best_val_loss"]
        except Exception as error:  # safetensors has an exception of its own for a full disk
            self._error = error
            self.told({"step": step, "error": str(error)})
            return
        write_s = time.perf_counter() - began
        self.told(
            {"step": step, "path": path, "best": best, "stall_s": stall_s, "write_s": write_s}
        )
