"""Measures the training loop without making the device wait between two points of the curve."""

import math
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from cvae.config.experiment import Experiment
from cvae.distributed.ranks import Ranks
from cvae.models.cvae import Cvae
from cvae.training.optimization import kl_weight, learning_rate

T = TypeVar("T")
SKIPPED_AT_MOST = 50
"""The number of skipped updates in a row that ends a run. Halved as often, the loss scale falls from 2^16 to
2^-34, and no gradient that needs a smaller one is worth training with. At 2^-150 it would be 0, and the next
update nan."""


class Meter:
    """Measures the rate and the share of time spent waiting for data; finds the step that ends training."""

    def __init__(
        self, model: Cvae, experiment: Experiment, ranks: Ranks, precision: str, total_steps: int
    ):
        """precision: as the engine has resolved it."""
        self.model, self.experiment, self.ranks = model, experiment, ranks
        self.total_steps = total_steps
        self.bad_step: int | None = None
        """The step that was not finite, or the last of SKIPPED_AT_MOST whose updates were skipped."""
        self.skipped = 0
        """The number of updates that were skipped in a row, up to the last reading."""
        # With loss scaling an overflow of the gradient is normal: the scaler skips that update.
        self._may_skip = precision == "fp16"
        self._noted: list[tuple[int, Tensor]] = []
        self.restart()

    def restart(self) -> None:
        """Begins a new interval, so that an evaluation or a save does not count as training."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waiting(self, feed: Iterable[T]) -> Iterator[T]:
        """Yields the feed's items and adds up the time that it waits for them."""
        iterator = iter(feed)
        while True:
            began = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield item

    def note(self, step: int, sums: Tensor) -> None:
        """Takes the result of Engine.step; it stays on the device, unread."""
        self._steps += 1
        self._noted.append((step, sums))

    def is_due(self, step: int) -> bool:
        """Returns whether the training curve has a point at this step."""
        every = self.experiment.training.log_every
        return step == 1 or step % every == 0 or step == self.total_steps

    def read(self, step: int, sums: Tensor) -> dict[str, float]:
        """Returns this step's metrics over the whole global batch; sets bad_step and skipped.

        A step whose update was skipped has no grad_norm. All ranks call it together.
        """
        self.bad_step = self._first_bad()
        recon_loss, kl, loss = self.ranks.sum(sums[:3].clone()).tolist()
        elapsed = time.perf_counter() - self._since
        batch_size = self.experiment.training.global_batch_size
        metrics = {
            "loss": loss,
            "recon_loss": recon_loss,
            "kl": kl,
            "bits_per_dim": self.model.bits_per_dim(recon_loss + kl),
            "learning_rate": learning_rate(self.experiment.optimizer, step - 1, self.total_steps),
            "beta": kl_weight(self.experiment.model, step - 1),
            "images_per_second": self._steps * batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        norm = float(sums[3])
        if math.isfinite(norm):
            metrics["grad_norm"] = norm
        self.restart()
        return metrics

    def _first_bad(self) -> int | None:
        """Returns the first new step after which training cannot go on; the same on all ranks."""
        noted, self._noted = self._noted, []
        # All steps of the interval are read at once: a read after each would slow a small model by some percent.
        finite = torch.stack([sums for _, sums in noted]).isfinite().int()
        for (step, _), row in zip(noted, self.ranks.min(finite).tolist(), strict=True):
            updated = bool(row[3])
            if not all(row[:3]) or not (updated or self._may_skip):
                return step
            self.skipped = 0 if updated else self.skipped + 1
            if self.skipped >= SKIPPED_AT_MOST:
                return step
        return None
