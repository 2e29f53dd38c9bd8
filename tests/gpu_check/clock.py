"""Rates from several windows, and how many images fit."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.gpu_check.curves import wait
from tests.studies.benchmarks.timing import Step, steps_per_second

_WINDOWS = 5
# A batch that takes longer ends the search.
_LONGEST_S = 8.0


class Rate(NamedTuple):
    """Of images, per second: the median of some windows, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:,.1f} images/s ({self.lowest:,.1f} to {self.highest:,.1f})"


def rate(
    step: Step,
    images: int,
    device: torch.device,
    seconds: float,
    multiple: int = 1,
    windows: int = _WINDOWS,
) -> Rate:
    """Measures windows of `seconds` together, after steps that warm up."""
    window = seconds / windows
    found = [images * steps_per_second(step, window, device, multiple) for _ in range(windows)]
    return of(found)


def of(values: list[float]) -> Rate:
    return Rate(statistics.median(values), min(values), max(values))


class Fit(NamedTuple):
    """The largest batch that went through."""

    images: int
    images_per_second: float
    peak_bytes: int
    """Of the GPU; 0 without one."""
    ended_by: str


def largest(action: Callable[[int], object], device: torch.device, most: int) -> Fit | None:
    """Doubles the batch until the device's memory is full, or `most` is reached; None if not even 1 fits."""
    best: Fit | None = None
    images = 1
    while images <= most:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            action(images)  # allocates, chooses kernels
            wait(device)
            began = time.perf_counter()
            action(images)
            wait(device)
            seconds = time.perf_counter() - began
        except torch.OutOfMemoryError:
            return _ended(best, f"{images} do not fit")
        except RuntimeError as error:
            # Kernels have limits of their own, as 2³¹ elements.
            return _ended(best, f"{images}: {str(error).splitlines()[0][:80]}")
        finally:
            gc.collect()
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        best = Fit(images, images / seconds, peak, "")
        if seconds > _LONGEST_S:
            return _ended(best, f"{images} take {seconds:.0f} s")
        images *= 2
    return _ended(best, f"no more than {most} are tried")


def _ended(best: Fit | None, by: str) -> Fit | None:
    return None if best is None else best._replace(ended_by=by)
